"""The documentation site builds without a warning, executes its notebooks, and is complete."""

import json
import subprocess
import sys
import zlib

import pytest

import ntm_jax
from tests.common import ROOT, environment

pytest.importorskip("sphinx")
pytest.importorskip("myst_nb")
pytest.importorskip("furo")
pytestmark = pytest.mark.slow
DOORS = {  # by module
    "ntm_jax": ntm_jax.__all__,
    "ntm_jax.api": ["with_arrays"],
    "ntm_jax.data": ["register"],
    "ntm_jax.data.sources": ["ArrayRecords", "Source", "check_split", "from_arrays", "open_source"],
    "ntm_jax.data.text": ["Encoder", "register"],
    "ntm_jax.training.objectives": ["LossContext", "Objective", "StepInputs", "register"],
    "ntm_jax.training.reward.rewards": ["Scores"],
    "ntm_jax.backbones": ["Backbone", "register"],
}


FEW_STEPS = """
import ntm_jax
full = ntm_jax.experiment
few = {"train.steps": 8, "evaluate.trajectories": 2, "evaluate.split": "test[:20]",
       "model.transporter_blocks": 1, "model.predictor_layers": 1, "model.width": 16,
       "model.head_size": 8, "model.kv_heads": 2, "model.transporter_width": 16}
# Where nothing shows what denoising does, its gradient is not compiled.
decoder = {"sample.decoder": "inverse"}
ntm_jax.experiment = lambda *names, **own: full(
    *names, **own | few | (decoder if "sample.num" in own else {}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; its notebooks are executed anew, with few steps and records."""
    out = tmp_path_factory.mktemp("site")
    startup = out / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "few_steps.py").write_text(FEW_STEPS)
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", out / "doctrees",
         "-D", f"nb_execution_cache_path={out}/notebooks", "docs", out / "html"],
        cwd=ROOT, env=environment(IPYTHONDIR=str(out / "ipython")), capture_output=True, text=True,
        check=False)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_public_name_is_in_the_inventory(site):
    _, body = (site / "objects.inv").read_bytes().split(b"compressed using zlib.\n", 1)
    documented = {line.split(" ")[0] for line in zlib.decompress(body).decode().splitlines()
                  if " py:" in line}
    expected = {f"{module}.{name}" for module, names in DOORS.items() for name in names}
    assert expected - documented == set()


def test_notebooks_show_their_outputs_and_no_warning(site):
    notebooks = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
    assert [path.stem for path in notebooks] == [
        "digits", "exact-likelihood", "posterior", "your-own-array"]
    for path in notebooks:
        page = (site / f"notebooks/{path.stem}.html").read_text()
        assert page.count("<img") >= 3, path.name
        assert "Warning" not in page, path.name
        cells = json.loads(path.read_text())["cells"]
        assert not any(cell.get("outputs") for cell in cells), f"{path.name}: clear its outputs"

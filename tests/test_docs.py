"""The documentation site builds without a warning, executes its notebooks, and is complete."""

import ast
import html
import json
import re
import subprocess
import sys
import zlib

import pytest

import ntm_jax
from ntm_jax.experiments import default
from ntm_jax.runtime import config
from tests.common import ROOT, environment

pytest.importorskip("sphinx")
pytest.importorskip("myst_nb")
pytest.importorskip("furo")
pytestmark = pytest.mark.slow
DOORS = {  # by module; of core every public function and class
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


def public(path) -> list[str]:
    """The names of a module's public functions and classes."""
    return [node.name for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]


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
    core = {".".join(path.relative_to(ROOT).with_suffix("").parts): public(path)
            for path in (ROOT / "ntm_jax/core").rglob("[!_]*.py")}
    expected = {f"{module}.{name}" for module, names in (DOORS | core).items() for name in names}
    assert expected - documented == set()


def test_docstrings_are_rendered_as_such(site):
    """Google sections become fields, fields of dataclasses bullets, and no markup is left over."""
    page = (site / "reference/api.html").read_text()
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "Raises:UserError" in re.sub(r"\s*\n\s*", "", text)
    assert "pixel_levels: V, the number of values that a pixel can take" in text
    assert "grid: tokens by row and column" in text
    assert "Type:" not in text  # napoleon's reading of a property's first line with a colon
    assert not re.search(r"``|:\w+:`", text)


def test_every_setting_is_on_its_page(site):
    page = (site / "reference/settings.html").read_text()
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    settings = config.flatten(default.get_config().to_dict())
    assert [key for key in settings if not re.search(rf"^{re.escape(key)}$", text, re.M)] == []
    assert "Peak learning rate, after the warmup" in text


def test_every_experiment_and_program_has_a_section(site):
    for folder, page in (("experiments", "experiments"), ("launch", "flags")):
        text = (site / f"reference/{page}.html").read_text()
        names = {path.stem for path in (ROOT / folder).glob("[!_]*.py")}
        names -= {"default", "mistakes", "program"}
        assert [name for name in names if f'">{name}</span>' not in text] == []
    assert "--heartbeat_timeout" in text


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

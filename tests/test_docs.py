"""The documentation site builds without a warning and is complete; its notebooks run."""

import json
import pathlib
import sys
import zlib

import pytest

import ntm_jax
from tests.common import ROOT, python

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
    "ntm_jax.projects.reward.rewards": ["Scores"],
    "ntm_jax.backbones": ["Backbone", "register"],
}


FEW = {"train.steps": 8, "evaluate.trajectories": 2, "evaluate.split": "test[:20]",
       "model.transporter_blocks": 0, "model.predictor_layers": 1, "model.width": 16,
       "model.head_size": 8, "model.kv_heads": 2, "model.transporter_width": 16}


def main(*notebooks):
    """Runs the cells of notebooks, with few steps and records; prints how many figures each draws.

    Where nothing shows what denoising does, its gradient is not compiled.
    """
    import matplotlib.pyplot as plt
    from IPython.core.inputtransformer2 import TransformerManager

    full, decoder = ntm_jax.experiment, {"sample.decoder": "inverse"}
    ntm_jax.experiment = lambda *names, **own: full(
        *names, **own | FEW | (decoder if "sample.num" in own else {}))
    for path in notebooks:
        space: dict = {}
        for cell in cells(path):
            if cell["cell_type"] == "code":
                exec(TransformerManager().transform_cell("".join(cell["source"])), space)
        print(f"{path}: {len(plt.get_fignums())} figures")
        plt.close("all")


def cells(path) -> list[dict]:
    return json.loads(pathlib.Path(path).read_text())["cells"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; its notebooks are not executed, and its theme is plain."""
    out = tmp_path_factory.mktemp("site")
    python("-c", "import sys; from sphinx.cmd.build import main; sys.exit(main(sys.argv[1:]))",
           "-W", "--keep-going", "-q", "-D", "html_theme=basic", "-d", f"{out}/doctrees", "docs",
           f"{out}/html", NTM_JAX_NOTEBOOKS="off")
    return out / "html"


def test_every_public_name_is_in_the_inventory(site):
    _, body = (site / "objects.inv").read_bytes().split(b"compressed using zlib.\n", 1)
    documented = {line.split(" ")[0] for line in zlib.decompress(body).decode().splitlines()
                  if " py:" in line}
    expected = {f"{module}.{name}" for module, names in DOORS.items() for name in names}
    assert expected - documented == set()


def test_notebooks_run_without_a_warning_and_are_kept_without_outputs(tmp_path):
    notebooks = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
    done = python(__file__, *notebooks, cwd=tmp_path, MPLBACKEND="agg")
    assert "Warning" not in done.stderr
    for path in notebooks:
        assert int(done.stdout.partition(f"{path}: ")[2].split()[0]) >= 2, path.name
        assert not any(cell.get("outputs") for cell in cells(path)), f"{path.name}: clear them"


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A copy of the package without its projects and tools does the whole job of the building."""

import json
import shutil

import pytest

from tests.common import ROOT, TINY, python
from tests.test_own_data import draw

pytestmark = pytest.mark.slow

ROOMS = ("core", "data", "evaluation", "export", "runtime", "sampling", "training")
JOB = """
import ntm_jax

run = ntm_jax.train(ntm_jax.experiment("captions", **{changes!r}), "run", progress=False)
assert run.config.data.text_encoder == "words:3:a blue card red ring"
assert 0 < run.evaluate()["bits_per_dim"]["bound"]["mean"] < 20
run.export("export")
images = ntm_jax.load("export").sample(4, prompts="a red ring")
assert (images == ntm_jax.load("run").sample(4, prompts="a red ring")).all()
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Runs Python in a copy of the checkout without projects, tools and their tests."""
    folder = tmp_path_factory.mktemp("bare")
    left_out = shutil.ignore_patterns("__pycache__", "projects", "tools", "peers")
    for name in ("ntm_jax", "launch", "experiments", "docs/howto", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", folder)  # pytest's settings
    # The finder of an editable installation gives the checkout's modules in place of absent ones.
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path = [found for found in sys.meta_path\n"
        "                 if getattr(found, '__name__', '') != '_EditableFinder']\n")

    def call(*arguments: str, check: bool = True):
        return python(*arguments, check=check, cwd=folder, PYTHONPATH=str(folder))

    return call


def test_own_captions_are_one_call_to_train_and_sample_and_export(bare, tmp_path):
    lines = draw(tmp_path, 60)
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {"data.source": f"folder:{tmp_path}", "data.image_size": 8, "data.patch_size": 4,
           "evaluate.split": "test", "model.transporter_blocks": 0}
    bare("-c", JOB.format(changes=TINY | own))


@pytest.mark.parametrize(("experiment", "absent"), [
    ("shapes", "projects.scenes.shapes"),
    ("digits_reward", "projects.reward.settings"),
])
def test_a_run_that_needs_a_missing_project_says_so_in_a_line(bare, experiment, absent, tmp_path):
    ended = bare("-m", "launch.train", f"--config={experiment}", f"--workdir={tmp_path}/run",
                 check=False)
    assert ended.returncode == 2
    assert ended.stderr.strip() == (
        f"error: this copy of ntm_jax has no ntm_jax.{absent}: install the whole package")


def test_its_own_tests_import_and_those_that_look_up_projects_pass(bare):
    bare("-m", "pytest", "-q", "--collect-only", *(f"tests/{room}" for room in ROOMS))
    bare("-m", "pytest", "-q", "tests/data/sources")

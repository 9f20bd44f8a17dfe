"""A copy of the package without its projects and tools does the whole job of the building."""

import shutil

import pytest

from tests.common import ROOT, TINY, python
from tests.test_own_data import draw

pytestmark = pytest.mark.slow

ROOMS = ("core", "data", "evaluation", "export", "runtime", "sampling", "training")
RUN = ("data/sources",)  # they look up parts of projects; all tests would take minutes
JOB = """
import ntm_jax

for name, changes in {changes!r}.items():
    run = ntm_jax.train(ntm_jax.experiment(name, **changes), f"runs/{{name}}", progress=False)
    assert 0 < run.evaluate()["bits_per_dim"]["bound"]["mean"] < 20
    run.export(f"exports/{{name}}")
    again = ntm_jax.load(f"exports/{{name}}")
    assert (again.sample(4) == ntm_jax.load(f"runs/{{name}}").sample(4)).all()
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


def test_it_trains_evaluates_samples_and_exports_digits_and_a_folder(bare, tmp_path):
    draw(tmp_path, 60)
    own = {"data.source": f"folder:{tmp_path}", "data.image_size": 8, "data.patch_size": 4,
           "evaluate.split": "test", "model.transporter_blocks": 0}
    changes = {"digits": TINY, "folder": TINY | own}
    bare("-c", JOB.format(changes=changes))


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


def test_its_own_tests_pass(bare):
    bare("-m", "pytest", "-q", "--collect-only", *(f"tests/{room}" for room in ROOMS))
    bare("-m", "pytest", "-q", *(f"tests/{room}" for room in RUN))

"""The package as pip installs it, outside a checkout: its files, and the programs in turn."""

import json
import shutil
import zipfile

import numpy as np
import pytest

from tests.common import ROOT, TINY, python
from tests.test_image import COPIED

SOURCES = ("ntm_jax", "launch", "experiments")


pytest.importorskip("setuptools", minversion="77")  # builds the wheel
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the files of the Dockerfile; building it leaves nothing here."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "checkout").mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "checkout" / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / "checkout")
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
           f"--wheel-dir={folder}", str(folder / "checkout"))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def program(wheel, tmp_path_factory):
    """Runs a program of the installed package in a folder with nothing else."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    python("-m", "pip", "install", "--quiet", "--no-deps", f"--target={site}", str(wheel))

    def call(name: str, *arguments: str, check: bool = True):
        return python("-m", f"ntm_jax.launch.{name}", *arguments, check=check, cwd=folder,
                      PYTHONPATH=str(site))

    found = python("-c", "import ntm_jax; print(ntm_jax.__file__, *ntm_jax.__path__)",
                   cwd=folder, PYTHONPATH=str(site)).stdout.split()
    assert found == [f"{site}/ntm_jax/__init__.py", f"{site}/ntm_jax"]
    call.folder, call.site = folder, site
    return call


@pytest.fixture(scope="module")
def run(program):
    """The folder of an even smaller quick look at `digits`, found by its name."""
    settings = TINY | {"train.steps": 2, "evaluate.trajectories": 1}
    program("train", "--config=digits:smoke", "--workdir=run",
            *(f"--config.{key}={value}" for key, value in settings.items()))
    return program.folder / "run"


def test_the_wheel_holds_every_module_and_launcher(wheel):
    kinds = (".py", ".typed", ".sh", ".sbatch", ".yaml")
    expected = {
        path.relative_to(ROOT).as_posix().removeprefix("ntm_jax/")
        for name in SOURCES for path in (ROOT / name).rglob("*") if path.suffix in kinds}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.removeprefix("ntm_jax/") for name in names if "dist-info" not in name} == expected
    assert not any(name.startswith(("launch/", "experiments/")) for name in names)


def test_pip_shows_a_home_page(program):
    about = next(program.site.glob("ntm_jax-*.dist-info/METADATA")).read_text()
    assert "\nProject-URL: Homepage, https://arxiv.org/abs/2605.08078\n" in about


def test_a_run_is_exported_by_the_console_script_and_the_export_samples(run, program):
    assert json.loads((run / "config.json").read_text())["data"]["source"] == "digits"
    assert (run / "samples.png").exists()
    python(str(program.site / "bin" / "ntm-jax"), "export", "--workdir=run", "--out=export",
           cwd=program.folder, PYTHONPATH=str(program.site))
    python("export/sample.py", "4", cwd=program.folder, PYTHONPATH="")
    with np.load(program.folder / "samples.npz") as archive:
        assert len(archive[archive.files[0]]) == 4


def test_what_needs_a_checkout_says_so_in_a_line(program):
    done = program("benchmark", "--peers=nowhere", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--peers needs the adapters in tests/peers: run it in a checkout" in done.stderr

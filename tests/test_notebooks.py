"""The notebooks of docs/notebooks run from start to end, with this checkout's package."""

import time

import pytest

from tests.common import ROOT, environment

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_notebooks_are_committed_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    assert [path.stem for path in NOTEBOOKS] == ["digits", "exact-likelihood", "your-own-array"]
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3", path.name
        for cell in notebook.cells:
            assert not cell.get("outputs"), f"{path.name} has outputs: clear them"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_without_warnings(path, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, 4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    begin = time.monotonic()
    # As a user runs it, with the compiler's optimisations, which these computations repay.
    client.execute(env=environment(JAX_DISABLE_MOST_OPTIMIZATIONS="0"))
    print(f"{path.name}: {time.monotonic() - begin:.0f} s")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    errors = "".join(o.text for o in outputs if o.get("name") == "stderr")
    assert "Warning" not in errors, errors

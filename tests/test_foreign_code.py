"""Folders from others run no code: loading, evaluating, training and preparing them.

None of these imports a module that such a folder names.
"""

import ast
import dataclasses
import json
import os
import sys

import pytest

from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError
from ntm_jax.evaluation import evaluate
from ntm_jax.export.read import load_run
from ntm_jax.runtime import config
from ntm_jax.tools.prepare import PrepareOptions, inputs
from ntm_jax.training import loop, objectives
from tests.common import ROOT, tiny_config, write_run

MODULE = "foreign_module_of_a_folder"
FEATURES = {"pythonClassName": f"{MODULE}.Feature", "jsonFeature": {"json": "{}"}}
NESTED = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
          "jsonFeature": {"json": json.dumps(
              {"image": {"type": f"{MODULE}.Feature", "content": {}}})}}


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A folder in tfds' layout that names a module; fails if that module was imported.

    The module can be imported here, and writes a file when it is.
    """
    monkeypatch.syspath_prepend(tmp_path)
    for name in (MODULE, f"{MODULE}_dataset_builder"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    folder = tmp_path / "hostile" / "1.0.0"
    folder.mkdir(parents=True)
    splits = [{"name": "train", "shardLengths": ["1"], "numBytes": "1"}]
    info = {"name": "hostile", "version": "1.0.0", "fileFormat": "array_record",
            "moduleName": MODULE, "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(FEATURES))
    yield folder
    assert not (tmp_path / "imported").exists()
    assert MODULE not in sys.modules


def test_a_run_that_names_a_module_imports_nothing(hostile, tmp_path, monkeypatch):
    settings = tiny_config(**{
        "model.transporter_blocks": 0, "trajectory.steps": (1,), "sample.steps": 1})
    source, name = settings.data.open("train"), f"tfds:{hostile}"
    data = dataclasses.replace(settings.data, source=name)
    with monkeypatch.context() as patch:  # like a run from elsewhere
        patch.setattr(config.Data, "open", lambda *_: source)
        workdir = write_run(tmp_path / "run", dataclasses.replace(settings, data=data))
    run = load_run(str(workdir))
    refused = rf"^{name} is neither .*'{MODULE}.Feature', which its files name"
    with pytest.raises(UserError, match=refused):
        evaluate.evaluate(run)
    with pytest.raises(UserError, match=refused):
        loop.train(run.config, str(tmp_path / "other"), progress=False)
    with pytest.raises(UserError, match=refused):
        inputs.open_input(PrepareOptions(name))


def test_no_file_of_a_tfds_folder_has_a_module_imported(hostile, tmp_path, monkeypatch):
    """In JSON within a string, too, and in either file."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    refused = f"'{MODULE}.Feature', which its files name, is no feature of tfds"
    (hostile / "features.json").write_text(json.dumps(NESTED))
    for name in (hostile, "hostile:1.0.0"):
        with pytest.raises(UserError, match=f"^tfds:{name} is neither .*{refused}"):
            open_source(f"tfds:{name}", "train")
    (hostile / "features.json").unlink()
    info = json.loads((hostile / "dataset_info.json").read_text())
    (hostile / "dataset_info.json").write_text(json.dumps(info | {"features": FEATURES}))
    with pytest.raises(UserError, match=refused):
        open_source(f"tfds:{hostile}", "train")
    os.mkfifo(hostile / "features.json")
    with pytest.raises(UserError, match=r"features\.json is not a regular file"):
        open_source(f"tfds:{hostile}", "train")
    for name in (f"huggingface:{MODULE}", "hostile/data_dir=."):
        with pytest.raises(UserError, match=f"^tfds:{name} is neither a data set known to tfds"):
            open_source(f"tfds:{name}", "train")


def test_no_call_of_transformers_runs_code_of_a_folder():
    """Its default asks on a terminal, and such a folder names its own modules."""
    calls = [node for path in (ROOT / "ntm_jax").rglob("*.py")
             for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"]
    refusing = [call for call in calls for given in call.keywords
                if given.arg == "trust_remote_code" and ast.literal_eval(given.value) is False]
    assert calls == refusing != []


@pytest.mark.parametrize(
    "key", ["data.source", "data.text_encoder", "model.backbone", "train.objective"])
def test_a_module_as_a_setting_is_not_imported(hostile, key):
    section, _, name = key.partition(".")
    for value in (MODULE, f"{MODULE}:Feature", f"transformers:{MODULE}"):
        values = tiny_config().raw
        values[section][name] = value
        with pytest.raises(UserError):  # noqa: PT012 it is opened as the programs do
            settings = config.read(values)
            objectives.checked(settings)
            settings.data.open("train")

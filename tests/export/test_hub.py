"""Exports on the Hugging Face Hub, with its calls replaced: pushed, loaded by name, refused."""

import dataclasses
import pathlib
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

import ntm_jax
from ntm_jax import files
from ntm_jax.errors import UserError
from ntm_jax.export import publish
from tests.common import bits
from tests.export.common import FILES, SETTINGS, copy_of, refused_by_load, refused_by_training

huggingface_hub = pytest.importorskip("huggingface_hub")


class Hub:
    """Repositories in memory, as huggingface_hub's calls of these names have them.

    commits: {OWNER/NAME: [{file: content} of each commit]}; a revision is a commit's number.
    """

    def __init__(self, folder):
        self.folder, self.private, self.commits, self.downloaded = folder, {}, {}, []

    def whoami(self, api):
        return {"name": "me"}

    def create_repo(self, api, repo_id, private=None, exist_ok=False):
        assert exist_ok or repo_id not in self.commits
        self.private.setdefault(repo_id, bool(private))
        self.commits.setdefault(repo_id, [])

    def repo_info(self, api, repo_id):
        return SimpleNamespace(private=self.private[repo_id])

    def create_commit(self, api, repo_id, operations, commit_message):
        given = {each.path_in_repo: each.path_or_fileobj for each in operations}
        self.kinds = {type(content) for content in given.values()}
        self.commits[repo_id].append({
            name: content if isinstance(content, bytes) else pathlib.Path(content).read_bytes()
            for name, content in given.items()})
        return SimpleNamespace(oid=str(len(self.commits[repo_id]) - 1))

    def snapshot_download(self, repo_id, revision, allow_patterns):
        if repo_id not in self.commits:
            raise FileNotFoundError(f"404: {repo_id}\nand more")
        commit = self.commits[repo_id][-1 if revision is None else int(revision)]
        folder = self.folder / repo_id / str(revision)
        folder.mkdir(parents=True, exist_ok=True)
        for name in commit.keys() & set(allow_patterns):
            (folder / name).write_bytes(commit[name])
            self.downloaded.append(name)
        return str(folder)


@pytest.fixture
def server(tmp_path):
    """The Hub that huggingface_hub's calls now speak to; they have its own signatures."""
    found, api = Hub(tmp_path / "cache"), huggingface_hub.HfApi
    with mock.patch.multiple(api, **{
            name: mock.create_autospec(getattr(api, name), side_effect=getattr(found, name))
            for name in ("whoami", "create_repo", "repo_info", "create_commit")}), \
         mock.patch.object(huggingface_hub, "snapshot_download", autospec=True,
                           side_effect=found.snapshot_download):
        yield found


def test_a_pushed_export_is_loaded_by_name_and_revision(server, exported, tmp_path, started):
    copy = copy_of(exported, tmp_path)
    (copy / "README.md").write_text("---\nlicense: mit\n---\n")  # its owner may
    (copy / "notes.txt").write_text("private")
    assert ntm_jax.push(str(exported), "me/digits") == "hf://me/digits@0"
    assert ntm_jax.push(str(copy), "me/digits") == "hf://me/digits@1"
    first, second = server.commits["me/digits"]
    assert first == {file.name: file.read_bytes() for file in exported.iterdir()}
    assert sorted(second) == FILES
    assert second["README.md"].startswith(b"---\nlicense")
    original = ntm_jax.load(str(exported))
    for address in ("me/digits", "me/digits@0"):
        found = ntm_jax.load(f"hf://{address}")
        assert (found.workdir, found.step) == (f"hub/{address}", 4)
        assert found.config == original.config
        assert bits(found.params) == bits(original.params)
    np.testing.assert_array_equal(found.sample(5, seed=7), original.sample(5, seed=7))
    assert set(server.downloaded) == {"config.json", "model.safetensors"}  # and no programs
    settings = dataclasses.replace(SETTINGS, init_from="hf://me/digits")
    current, _ = started(settings, tmp_path / "new")
    assert bits(current.params["params"]) == bits(original.params["params"])


def test_an_export_on_object_storage_is_pushed(server, exported, monkeypatch):
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    ntm_jax.push(str(exported), "me/digits")
    monkeypatch.undo()
    assert server.kinds == {bytes}  # and not paths, which huggingface_hub would look for on a disk
    [commit] = server.commits["me/digits"]
    assert commit == {file.name: file.read_bytes() for file in exported.iterdir()}


def test_a_download_is_verified(server, exported, tmp_path):
    ntm_jax.push(str(exported), "me/damaged")
    weights = bytearray((exported / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    server.commits["me/damaged"][0]["model.safetensors"] = bytes(weights)
    refused_by_load("hf://me/damaged", "model.safetensors is damaged: params/")
    refused_by_training(SETTINGS, "hf://me/damaged", tmp_path, "is damaged: params/")
    server.commits["me/other"] = [{"config.json": b"{}", "pytorch_model.bin": b"\x80"}]
    refused_by_load("hf://me/other", "holds no export of ntm_jax, since it has no model")
    for address in ("hf://digits", "hf://../digits", "hf://me/digits@"):
        refused_by_load(address, "is no address on the Hub: expected hf://OWNER/NAME, or")
    refused_by_load("hf://me/none", "hf://me/none: FileNotFoundError: 404: me/none: check the name")


def test_a_private_repository_stays_private(server, exported):
    ntm_jax.push(str(exported), "me/secret", private=True)
    ntm_jax.push(str(exported), "me/secret")
    ntm_jax.push(str(exported), "me/open")
    assert server.private == {"me/secret": True, "me/open": False}
    with pytest.raises(UserError, match="me/open exists and is public"):
        ntm_jax.push(str(exported), "me/open", private=True)
    assert len(server.commits["me/open"]) == 1


def test_what_cannot_be_pushed_is_refused(server, exported, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is no repository on the Hub: expected OWNER/NAME"):
        publish.check("digits")
    error = huggingface_hub.errors.LocalTokenNotFoundError("no token")
    with mock.patch.object(huggingface_hub.HfApi, "whoami", side_effect=error), pytest.raises(
            UserError, match=r"LocalTokenNotFoundError: .* log in with `hf auth login`"):
        ntm_jax.push(str(exported), "me/digits")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install huggingface_hub \(the extra \[hub\]\)"):
        ntm_jax.load("hf://me/digits")

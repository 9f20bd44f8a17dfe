"""Exports on the Hugging Face Hub, against a stand-in server: pushed, loaded by name, refused."""

import dataclasses
import json
import sys

import numpy as np
import pytest

import ntm_jax
from ntm_jax.errors import UserError
from ntm_jax.export import hub, publish
from tests.common import bits, python
from tests.export.common import SETTINGS, copy_of, refused_by_training
from tests.export.hub_server import TOKEN, Hub

pytest.importorskip("huggingface_hub")
FILES = {"README.md", "config.json", "log_likelihood.bin", "model.safetensors", "sample.py",
         "sampler.bin"}


def environment(url: str, home, token: str = TOKEN) -> dict:
    """The variables that point huggingface_hub at a server, with a cache and a token of its own."""
    return {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """A function: huggingface_hub is imported anew at its next use, with these variables."""
    def start(url: str, token: str = TOKEN, **variables):
        for name, value in (environment(url, tmp_path / "home", token) | variables).items():
            monkeypatch.setenv(name, value)
        for name in list(sys.modules):
            if name.partition(".")[0] == "huggingface_hub":
                monkeypatch.delitem(sys.modules, name)

    return start


@pytest.fixture
def server(anew):
    """The stand-in for the Hub, which this process now uses."""
    with Hub() as server:
        anew(server.url)
        yield server


@pytest.fixture
def pushed(server, exported):
    """The address of the export at its commit, hf://me/digits@COMMIT."""
    return ntm_jax.push(str(exported), "me/digits")


def refused(address: str, message: str) -> None:
    """Asserts that an address cannot be loaded, for a reason given in one line."""
    with pytest.raises(UserError) as error:
        ntm_jax.load(address)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pushed_export_is_loaded_by_name(server, pushed, exported, tmp_path, started):
    commit, files = server.find("me/digits", "main")
    assert pushed == f"hf://me/digits@{commit}"
    assert files == {file.name: file.read_bytes() for file in exported.iterdir()}
    assert set(files) == FILES
    original = ntm_jax.load(str(exported))
    for address, folder in (("hf://me/digits", "hub/me/digits"),
                            (pushed, f"hub/me/digits@{commit}")):
        found = ntm_jax.load(address)
        assert (found.workdir, found.step, found.config) == (folder, 4, original.config)
        assert bits(found.params) == bits(original.params)
    np.testing.assert_array_equal(found.sample(4, seed=7), original.sample(4, seed=7))
    # Programs are not even downloaded, and the rest is downloaded once.
    wanted = [path for path in server.requested if "/resolve/" in path]
    assert {path.rpartition("/")[2] for path in wanted} == {"config.json", "model.safetensors"}
    settings = dataclasses.replace(SETTINGS, init_from="hf://me/digits")
    current, _ = started(settings, tmp_path / "new")
    assert bits(current.params) == bits(original.params)
    assert [path for path in server.requested if "/resolve/" in path] == wanted


def test_an_earlier_revision_is_loaded(server, pushed, exported, tmp_path):
    again = copy_of(exported, tmp_path)
    (again / "README.md").write_text("---\nlicense: mit\n---\n")  # its owner may
    newer = ntm_jax.push(str(again), "me/digits")
    assert newer != pushed
    for address, card in ((pushed, (exported / "README.md").read_bytes()), (newer, b"---\nlic")):
        assert server.find(*hub.parse(address))[1]["README.md"].startswith(card)
        assert ntm_jax.load(address).step == 4
    refused("hf://me/digits@v2", "RevisionNotFoundError: ")


@pytest.mark.usefixtures("pushed")
def test_a_download_is_verified(server, tmp_path):
    commit, files = server.find("me/digits", "main")
    weights = bytearray(files["model.safetensors"])
    weights[-1] ^= 1
    damaged = {**files, "model.safetensors": bytes(weights)}
    server.repositories["me/damaged"] = {"private": False, "commits": [(commit, damaged)]}
    refused("hf://me/damaged", "model.safetensors is damaged: params/")
    refused_by_training(SETTINGS, "hf://me/damaged", tmp_path, "is damaged: params/")
    other = {"config.json": b"{}", "pytorch_model.bin": b"\x80"}
    server.repositories["me/other"] = {"private": False, "commits": [(commit, other)]}
    refused("hf://me/other", "holds no export of ntm_jax, since it has no model.safetensors")
    refused("hf://me/none", "RepositoryNotFoundError: ")


@pytest.mark.parametrize("address", ["hf://digits", "hf://../digits", "hf://me/digits@"])
def test_addresses_have_an_owner_and_a_name(address):
    refused(address, "is no address on the Hub: expected hf://OWNER/NAME, or")


def test_an_export_is_pushed_whole_and_nothing_else(server, exported, tmp_path):
    copy = copy_of(exported, tmp_path)
    (copy / "notes.txt").write_text("private")
    ntm_jax.push(str(copy), "me/digits")
    assert set(server.find("me/digits", "main")[1]) == FILES
    (copy / "sampler.bin").unlink()
    with pytest.raises(UserError, match=r"copy has no sampler\.bin"):
        ntm_jax.push(str(copy), "me/digits")
    assert len(server.repositories["me/digits"]["commits"]) == 1


def test_a_private_repository_stays_private(server, exported):
    ntm_jax.push(str(exported), "me/secret", private=True)
    assert server.repositories["me/secret"]["private"]
    ntm_jax.push(str(exported), "me/secret")
    assert server.repositories["me/secret"]["private"]
    ntm_jax.push(str(exported), "me/open")
    assert not server.repositories["me/open"]["private"]
    with pytest.raises(UserError, match="me/open exists and is public"):
        ntm_jax.push(str(exported), "me/open", private=True)
    assert len(server.repositories["me/open"]["commits"]) == 1


def test_without_a_token_or_the_package_nothing_is_pushed(server, anew, exported, monkeypatch):
    with pytest.raises(UserError, match="is no repository on the Hub: expected OWNER/NAME"):
        publish.check("digits")
    anew(server.url, token="")
    with pytest.raises(UserError, match=r"LocalTokenNotFoundError: .* log in with `hf auth login`"):
        ntm_jax.push(str(exported), "me/digits")
    assert not server.repositories
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: publish.check("me/digits"), lambda: ntm_jax.load("hf://me/digits")):
        with pytest.raises(UserError, match=r"pip install huggingface_hub \(the extra \[hub\]\)"):
            call()


@pytest.mark.slow
def test_the_programs_push_and_read_a_run_on_the_hub(workdir, tmp_path):
    with Hub() as server:
        variables = environment(server.url, tmp_path / "home")

        def program(name, *flags):
            return python("-m", f"launch.{name}", *flags, cwd=tmp_path, **variables)

        done = program("export", f"--workdir={workdir}", "--out=out", "--push=me/digits")
        commit, _ = server.find("me/digits", "main")
        assert done.stdout.splitlines()[-1] == f"pushed: hf://me/digits@{commit}"
        program("sample", "--workdir=hf://me/digits", "--num=2")
        program("evaluate", "--workdir=hf://me/digits", "--trajectories=1")
    results = tmp_path / "hub/me/digits"
    assert json.loads((results / "evaluation.json").read_text())["step"] == 4
    assert (results / "samples/samples.npz").exists()

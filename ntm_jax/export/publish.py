"""Uploads exports to the Hugging Face Hub, where hf://OWNER/NAME loads them; see hub.py."""

import hashlib
import importlib.metadata
import re

from etils import epath

from ntm_jax.errors import UserError, shown
from ntm_jax.export import hub
from ntm_jax.export.read import CONFIG, REMEDY, ExportInfo, read_export_info
from ntm_jax.files import is_remote

VERSION = importlib.metadata.version("ntm_jax")
CARD = "README.md"  # the one file of an export that its owner may edit, to name a licence


def check(repository: str) -> None:
    """Checks, before work is done, that an upload can begin: the name, the network and a token.

    Raises UserError.
    """
    if not re.fullmatch(hub.NAME, repository, re.ASCII):
        raise UserError(f"--push={shown(repository, str)} is no repository on the Hub: expected "
                        "OWNER/NAME")
    api = hub.library().HfApi()
    with hub.mistakes(f"an upload to {repository}"):
        api.whoami()


def push(folder: str, repository: str, private: bool = False) -> str:
    """Uploads an export's own files in one commit; returns its address, hf://OWNER/NAME@COMMIT.

    Creates the repository if needed; private: as a private one. Other files in the folder stay
    there. Raises UserError if the folder is not an intact export, if the repository exists and is
    public in spite of `private`, or for what the Hub refuses.
    """
    if is_remote(folder):
        raise UserError(f"{folder} is not a local folder: copy it to one to push it")
    check(repository)
    about = read_export_info(folder)
    names = _intact_files(folder, about)
    library = hub.library()
    api = library.HfApi(library_name="ntm_jax", library_version=VERSION)
    with hub.mistakes(f"an upload to {repository}"):
        api.create_repo(repository, private=private or None, exist_ok=True)
        public = private and not api.repo_info(repository).private
    if public:
        raise UserError(f"{repository} exists and is public, and a private repository is asked "
                        "for: make it private on its page, or give another name; nothing was "
                        "uploaded")
    operations = [library.CommitOperationAdd(path_in_repo=name, path_or_fileobj=f"{folder}/{name}")
                  for name in names]
    with hub.mistakes(f"an upload to {repository}"):
        done = api.create_commit(repository, operations, commit_message=(
            f"Export of step {about.step}, ntm_jax {VERSION}"))
    return f"{hub.PREFIX}{repository}@{done.oid}"


def _intact_files(folder: str, about: ExportInfo) -> list[str]:
    """The names of an export's files, once they are compared with their digests."""
    if not about.files:
        raise UserError(f"{folder} was exported by an earlier version of ntm_jax, without digests: "
                        "export the run anew")
    for name, digest in about.files.items():
        path = epath.Path(folder) / name
        if not path.is_file():
            raise UserError(f"{path} is missing: {REMEDY}")
        with path.open("rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == digest
        if not intact and name != CARD:
            raise UserError(f"{path} was damaged or edited: its SHA-256 is not the one in "
                            f"{CONFIG}; {REMEDY}")
    return [*about.files, CONFIG]

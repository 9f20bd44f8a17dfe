"""Uploads exports to the Hugging Face Hub, where hf://OWNER/NAME loads them; see hub.py."""

import importlib.metadata
import re

from etils import epath

from ntm_jax import files
from ntm_jax.errors import UserError, abbreviate
from ntm_jax.export import hub
from ntm_jax.export.read import FILES, read_export_info

VERSION = importlib.metadata.version("ntm_jax")


def check(repository: str) -> None:
    """Checks, before work is done, that an upload can begin: the name, the network and a token.

    Raises UserError.
    """
    if not re.fullmatch(hub.NAME, repository, re.ASCII):
        raise UserError(f"--push={abbreviate(repository, str)} is no repository on the Hub: "
                        "expected OWNER/NAME")
    api = hub.library().HfApi()
    with hub.mistakes(f"an upload to {repository}"):
        api.whoami()


def push(folder: str, repository: str, private: bool = False) -> str:
    """Uploads an export's own files in one commit; returns its address, hf://OWNER/NAME@COMMIT.

    Creates the repository if needed; private: as a private one. Other files in the folder stay
    there. Raises UserError if the repository exists and is public in spite of `private`, or for
    what the Hub refuses.
    """
    check(repository)
    about = read_export_info(folder)
    library = hub.library()
    api = library.HfApi(library_name="ntm_jax", library_version=VERSION)
    with hub.mistakes(f"an upload to {repository}"):
        api.create_repo(repository, private=private or None, exist_ok=True)
        public = private and not api.repo_info(repository).private
    if public:
        raise UserError(f"{repository} exists and is public, and a private repository is asked "
                        "for: make it private on its page, or give another name; nothing was "
                        "uploaded")
    with hub.mistakes(f"an upload to {repository}"):
        paths = {name: epath.Path(folder) / name for name in FILES}
        operations = [
            library.CommitOperationAdd(  # it reads local files only
                name, path.read_bytes() if files.is_remote(folder) else str(path))
            for name, path in paths.items()]
        done = api.create_commit(repository, operations, commit_message=(
            f"Export of step {about.step}, ntm_jax {VERSION}"))
    return f"{hub.PREFIX}{repository}@{done.oid}"

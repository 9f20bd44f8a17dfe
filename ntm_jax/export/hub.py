"""Models on the Hugging Face Hub: addresses such as hf://OWNER/NAME, downloads, its errors.

huggingface_hub, the extra [hub], is imported at first use. A download takes the named files only,
and executes nothing.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator, Sequence

from ntm_jax import files
from ntm_jax.data import pretrained
from ntm_jax.errors import UserError, abbreviate, first_line

PREFIX = "hf://"
NAME = r"\w[\w.-]*/\w[\w.-]*"  # OWNER/NAME
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
REMEDY = f"check the name, the network, and if the repository is private or gated {LOGIN}"


def is_address(where) -> bool:
    """Whether a run is named by its address on the Hub rather than by its folder."""
    return str(where).startswith(PREFIX)


def parse(address: str) -> tuple[str, str | None]:
    """hf://OWNER/NAME or hf://OWNER/NAME@REVISION -> (OWNER/NAME, REVISION or None).

    Raises UserError for anything else.
    """
    match = re.fullmatch(rf"{PREFIX}({NAME})(?:@(\S+))?", str(address), re.ASCII)
    if not match:
        raise UserError(f"{abbreviate(str(address), str)} is no address on the Hub: expected "
                        f"{PREFIX}OWNER/NAME, or {PREFIX}OWNER/NAME@REVISION with a branch, tag or "
                        "commit")
    return match[1], match[2]


def results_folder(where: str) -> str:
    """The folder that programs write a run's results to: its own, or hub/OWNER/NAME."""
    if not is_address(where):
        return files.expanded(where)
    name, revision = parse(where)
    return f"hub/{name}" + (f"@{re.sub(r'[^A-Za-z0-9_.-]', '-', revision)}" if revision else "")


def fetch(address: str, names: Sequence[str]) -> str:
    """The local folder, in huggingface_hub's cache, with the named files of a repository.

    Asks the Hub for the revision's present commit; without a network takes an earlier download.
    Raises UserError if the repository or a file is not there or cannot be read.
    """
    name, revision = parse(address)
    hub = library()
    with mistakes(address):
        folder = hub.snapshot_download(name, revision=revision, allow_patterns=list(names))
    for file in names:
        if not (pathlib.Path(folder) / file).is_file():
            raise UserError(f"{address} holds no export of ntm_jax, since it has no {file}: push "
                            "one with ntm-jax export --push=OWNER/NAME")
    return folder


def library():
    """The package huggingface_hub. Raises UserError where it is not installed."""
    return pretrained.module("huggingface_hub", "huggingface_hub (the extra [hub])")


@contextlib.contextmanager
def mistakes(what: str) -> Iterator[None]:
    """Turns huggingface_hub's errors in the block, and the network's, into UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {first_line(error)}: "
                        f"{REMEDY}") from error

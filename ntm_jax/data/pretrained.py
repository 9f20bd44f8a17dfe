"""Loads PyTorch models that prepare data, from local folders of safetensors.

torch and transformers are imported here on first use. The training job needs neither; the extras
[text] and [flux2] install them.
"""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

from ntm_jax.errors import UserError, first_line

_EXPECTED = "a folder in the layout of diffusers or transformers"


def module(name: str, install: str = "-e '.[flux2]'"):
    """The optional package `name`. UserError, with `pip install ...`, if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this needs the package {name}, which cannot be imported ({first_line(error)}): pip "
            f"install {install}"
        ) from None


def load(package: str, name: str, path: str, part: str, **options):
    """The model class `package`.`name` from the folder path/part, in inference mode.

    If path/part does not exist, `path` itself is the folder.

    Raises:
      UserError: there is no folder; safetensors of all its tensors, in the model's shapes, are not
        there (other formats are never opened); or the package cannot be imported.
    """
    kind, folder = getattr(module(package), name), find(path, part)
    with _reading(folder, f"{name} in safetensors"):
        model, info = kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, **options)
        lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
        if lacking:  # they would stay random, with a warning
            raise ValueError(
                f"{len(lacking)} tensors are missing or of another shape, such as {lacking[0]}")
    return model.eval()


def tokenizer(path: str, part: str):
    """The tokenizer of transformers in the folder path/part, or in `path` if that does not exist.

    Raises UserError as `load`.
    """
    folder = find(path, part)
    auto = module("transformers").AutoTokenizer
    with _reading(folder, "tokenizer"):
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def _reading(folder: Path, what: str) -> Iterator[None]:
    """Turns the errors of both libraries, of many kinds on absent or damaged files, into one."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is not read as a {what} ({first_line(error)}): give {_EXPECTED}"
        ) from None


def find(path: str, part: str) -> Path:
    """The folder path/part, or `path` if that does not exist. UserError if neither exists."""
    folder = Path(path) / part if (Path(path) / part).is_dir() else Path(path)
    if not folder.is_dir():
        raise UserError(f"{path} is not there: give {_EXPECTED}")
    return folder

"""PyTorch models that prepare data, from local folders of safetensors: torch, diffusers and transformers are imported here, when asked for.

The training job needs none of them; the extras [text] and [flux2] install them.
"""

import importlib
from pathlib import Path

from ntm_jax.errors import UserError, first_line

_EXPECTED = "a folder in the layout of diffusers or transformers"


def module(name: str, extra: str = "flux2"):
    """An optional package, which an extra installs. UserError where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"this needs the package {name}, which cannot be imported ({first_line(error)}): pip install -e "
                        f"'.[{extra}]'") from None


def load(package: str, name: str, path: str, part: str, **options):
    """The model class `package`.`name` from the folder path/part, or path itself where there is no such part, for inference.

    UserError: no folder, no safetensors of all its tensors in their shapes (other formats are never opened), or no such package.
    """
    kind, folder = getattr(module(package), name), find(path, part)
    try:
        model, told = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:  # they raise many kinds on what is absent or damaged
        raise UserError(f"{folder} is not read as a {name} in safetensors ({first_line(error)}): give {_EXPECTED}") from None
    lacking = sorted(map(str, (*told["missing_keys"], *told["mismatched_keys"])))
    if lacking:  # they would be left random, with a warning
        raise UserError(f"{folder} is no whole {name}: {len(lacking)} tensors are missing or of another shape, such as {lacking[0]}")
    return model.eval()


def tokenizer(path: str, part: str):
    """The tokenizer of transformers in the folder path/part, or path itself where there is no such part; UserError as `load`."""
    folder = find(path, part)
    try:
        return module("transformers").AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not read as a tokenizer ({first_line(error)}): give {_EXPECTED}") from None


def find(path: str, part: str) -> Path:
    """path/part, or path itself where there is no such part. UserError where there is no folder."""
    folder = Path(path) / part if (Path(path) / part).is_dir() else Path(path)
    if not folder.is_dir():
        raise UserError(f"{path} is not there: give {_EXPECTED}")
    return folder

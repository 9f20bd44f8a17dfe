"""Settings that suit a data set, for an experiment that leaves them open.

experiments/folder.py and captions.py leave the settings below None. `choose` sets them from what
the source holds and from whether an accelerator trains.
"""

import dataclasses
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


def _some_images(source: Source) -> list[np.ndarray]:
    return [source.records[row]["image"] for row in source.evenly_spread(_LOOKED_AT)]


def _side(data: _Data) -> int:
    """The images' shorter side; the median where they have several sizes."""
    return int(np.median([min(image.shape[:2]) for image in _some_images(data.train)]))


def _image_size(data: _Data) -> int:
    """The images' own size up to a limit for the device: 32 pixels on a CPU, 64 on others.

    It is a multiple of 4, which leaves a choice of patches.
    """
    if not data.train.pixel_levels:
        return 0
    return max(4, min(_side(data), 64 if data.accelerator else 32) // 4 * 4)


def _patch_size(data: _Data) -> int:
    """Cuts an image into about 4 x 4 tokens on a CPU, 8 x 8 on others."""
    side = data.settings["data.image_size"] or _side(data)
    divisors = [size for size in range(1, side + 1) if side % size == 0]
    return min(divisors, key=lambda size: abs(side / size - (8 if data.accelerator else 4)))


def _text_encoder(data: _Data) -> str:
    """The encoder of the records' text states, where they hold any.

    Otherwise an embedding of the captions' words where these are few, and MiniLM for more.
    """
    if data.train.text_width:
        return data.train.text
    if data.train.captions is None:
        raise UserError(
            f"{data.train.name} has no captions: put a metadata.jsonl into it, one line "
            "{\"file_name\": ..., \"caption\": ...} for each image, or take --config=folder"
            + (f" ({data.train.notes})" if data.train.notes else "")
        )
    captions = [*data.train.captions, *(data.held_out.captions or [])]
    words = [text.split(caption) for caption in captions]
    vocabulary = sorted({word for caption in words for word in caption})
    if len(vocabulary) > _MAX_WORDS:
        return "minilm"
    return f"words:{max(map(len, words))}:{' '.join(vocabulary)}"


def _data_std(data: _Data) -> float:
    """The deviation of the pixels, in [-1, 1], or of the latents; of a few images."""
    source, levels = data.train, data.train.pixel_levels
    resized = sources.open_source(source.name, source.split, data.settings["data.image_size"])
    std = float(np.std(np.stack(_some_images(resized)).astype(np.float64)))
    return max(0.05, round(std * 2 / (levels - 1) if levels else std, 2))


# In order: a choice may look at those before it.
CHOICES: dict[str, Callable[[_Data], Any]] = {
    "data.image_size": _image_size,
    "data.patch_size": _patch_size,
    "data.text_encoder": _text_encoder,
    "data.batch_size": lambda data: min(128 if data.accelerator else 32, len(data.train.records)),
    "model.data_std": _data_std,
    "model.condition": lambda data: "class" if data.train.num_classes > 1 else "none",
    "train.condition_dropout":
        lambda data: 0.0 if data.settings["model.condition"] == "none" else 0.1,
    # 100 samples of each class for its accuracy, none where nothing scores them.
    "evaluate.num_samples":
        lambda data: min(1000, 100 * data.classes) if data.train.pixel_levels else 0,
    "evaluate.batch_size": lambda data: min(100, len(data.held_out.records)),
    "sample.num": lambda data: 10 * min(10, data.classes) or 64,  # ten of each class
    "sample.guidance": lambda data: 1.0 if data.settings["train.condition_dropout"] else 0.0,
}


def choose(settings: dict[str, Any], accelerator: bool) -> dict[str, Any]:
    """The settings of CHOICES that are None, chosen for the data: {"section.key": value}.

    Args:
      settings: all settings of an experiment, {"section.key": value}.
      accelerator: whether a GPU or TPU trains.
    Raises:
      UserError: there is no data source, or it cannot be opened.
    """
    left_open = [key for key in CHOICES if settings[key] is None]
    if not left_open:
        return {}
    name = settings["data.source"]
    if not name:
        raise UserError(
            "config.data.source is empty: give your images, --config.data.source=folder:PATH"
        )
    train, held_out = (  # without slices
        sources.open_as_stored(name, settings[key].partition("[")[0])
        for key in ("data.split", "evaluate.split"))
    data = _Data(train, held_out, accelerator, dict(settings))
    for key in left_open:
        data.settings[key] = CHOICES[key](data)
    return {key: data.settings[key] for key in left_open}

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


def _image_size(data: _Data) -> int:
    """The images' own size up to a limit for the device: 32 pixels on a CPU, 64 on others.

    It is a multiple of 4, which leaves a choice of patches.
    """
    if not data.train.pixel_levels:
        return 0
    side = data.train.typical_side or _side(data.train)
    return max(4, min(side, 64 if data.accelerator else 32) // 4 * 4)


def _side(source: Source) -> int:
    """The shorter side of the images; of the first one where the source has several sizes."""
    sides = source.image_shape[:2]
    return min(source.records[0]["image"].shape[:2] if None in sides else sides)


def _patch_size(data: _Data) -> int:
    """Cuts an image into about 4 x 4 tokens on a CPU, 8 x 8 on others."""
    side = data.settings["data.image_size"] or _side(data.train)
    divisors = [size for size in range(1, side + 1) if side % size == 0]
    return min(divisors, key=lambda size: abs(side / size - (8 if data.accelerator else 4)))


def _text(data: _Data) -> str:
    """The encoder of the records' text states, where they hold any.

    Otherwise an embedding of the captions' words where these are few, and MiniLM for more.
    """
    if data.train.text_width:
        return data.train.text
    if data.train.captions is None:
        raise UserError(
            f"{data.train.name} has no captions ({data.train.no_captions or 'of any kind'}): "
            "put a metadata.jsonl into it, one line {\"file_name\": ..., \"caption\": ...} for "
            "each image, or take --config=folder"
        )
    captions = [*data.train.captions, *(data.held_out.captions or [])]
    words = [text.split(caption) for caption in captions]
    vocabulary = sorted({word for caption in words for word in caption})
    if len(vocabulary) > _MAX_WORDS:
        return "minilm"
    return f"words:{max(map(len, words))}:{' '.join(vocabulary)}"


def _batch_size(data: _Data) -> int:
    return min(128 if data.accelerator else 32, max(1, len(data.train.records)))


def _data_std(data: _Data) -> float:
    """The deviation of the pixels, in [-1, 1], or of the latents; of a few images."""
    base, levels = data.settings["data.split"].partition("[")[0], data.train.pixel_levels
    source = sources.open_source(data.train.name, base, data.settings["data.image_size"])
    shown = [source.records[row]["image"] for row in source.evenly_spread(_LOOKED_AT)]
    std = float(np.std(np.stack(shown).astype(np.float64)))
    return max(0.05, round(std * 2 / (levels - 1) if levels else std, 2))


def _condition(data: _Data) -> str:
    return "class" if data.train.num_classes > 1 else "none"


def _dropout(data: _Data) -> float:
    return 0.0 if data.settings["model.condition"] == "none" else 0.1


def _guidance(data: _Data) -> float:
    return 1.0 if data.settings["train.condition_dropout"] else 0.0


def _images(data: _Data) -> int:
    """Samples to score: 100 of each class for its accuracy, none where nothing scores them."""
    classes = data.train.num_classes if data.settings["model.condition"] == "class" else 0
    return min(1000, 100 * classes) if data.train.pixel_levels else 0


def _scored_at_once(data: _Data) -> int:
    return min(100, len(data.held_out.records))


def _grid(data: _Data) -> int:
    """Ten samples of each class, at most ten classes."""
    classed = data.settings["model.condition"] == "class"
    return 10 * min(10, data.train.num_classes) if classed else 64


# In order: a choice may look at those before it.
CHOICES: dict[str, Callable[[_Data], Any]] = {
    "data.image_size": _image_size,
    "data.patch_size": _patch_size,
    "data.text_encoder": _text,
    "data.batch_size": _batch_size,
    "model.data_std": _data_std,
    "model.condition": _condition,
    "train.condition_dropout": _dropout,
    "evaluate.num_samples": _images,
    "evaluate.batch_size": _scored_at_once,
    "sample.num": _grid,
    "sample.guidance": _guidance,
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
    train, held_out = (_open(name, key, settings[key]) for key in ("data.split", "evaluate.split"))
    data = _Data(train, held_out, accelerator, dict(settings))
    for key in left_open:
        data.settings[key] = CHOICES[key](data)
    return {key: data.settings[key] for key in left_open}


def _open(name: str, key: str, split: str) -> Source:
    """The source's split that the setting `key` names, without its slice, as it is stored."""
    try:
        return dataclasses.replace(
            sources.open_as_stored(name, split.partition("[")[0]), name=name)
    except sources.SplitError as error:
        raise UserError(f"config.{key}: {error}") from None

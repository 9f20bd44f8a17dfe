"""Samples this model: python sample.py [NUMBER [SEED [CLASSES]]] writes samples.npz and PNG files.

CLASSES, by name or number and separated by commas, are shown in turn: python sample.py 8 0 cat,dog.
A model of vectors takes in their place a CONDITION, numbers in its own units: 16 0 1.5,-2.
Images of 1 or 3 channels are also written to the folder samples/. Files of earlier calls are
replaced. Needs jax, flatbuffers, numpy, safetensors and pillow.
"""

import json
import pathlib
import sys
from typing import NoReturn

import jax.export
import numpy as np
import safetensors.numpy
from PIL import Image

FOLDER = pathlib.Path(__file__).parent
BATCH = 100  # the number of images made at a time


def main(arguments: list[str]) -> None:
    about = json.loads((FOLDER / "config.json").read_text())
    spec, kind = about["spec"], about["config"]["model"]["condition"]
    number = integer("NUMBER", arguments[0], 1, 1_000_000) if arguments else 16
    seed = integer("SEED", arguments[1], 0, 2**32 - 1) if arguments[1:] else about["config"]["seed"]
    choose = conditions(kind, spec, arguments[2] if arguments[2:] else None)

    parameters = jax.device_put(safetensors.numpy.load_file(FOLDER / "model.safetensors"))
    sampler = jax.export.deserialize(bytearray((FOLDER / "sampler.bin").read_bytes()))
    batch, run, parts = min(number, BATCH), jax.jit(sampler.call), []
    for start in range(0, number, batch):  # image i of a seed is the same image in any batch
        index = np.arange(start, start + batch, dtype=np.int32)
        parts.append(run(parameters, np.uint32(seed), index, *choose(index)))
    images = np.concatenate(parts)[:number]
    if spec["mean"]:  # the model's numbers have mean 0 and variance 1, by channel or column
        dtype = np.float64 if spec["columns"] else np.float32  # columns may vary by very little
        images = images * dtype(spec["std"]) + dtype(spec["mean"])

    np.savez("samples.npz", images=images)
    where = "samples.npz"
    if spec["levels"] and spec["image_shape"][-1] in (1, 3):
        where += " and samples/"
        write_pngs(np.rint(images * (255 / (spec["levels"] - 1))).astype(np.uint8))
    note = {"text": ", without a caption", "vector": ", at the mean of the training conditions"}
    print(f"{number} images {images.dtype}{list(images.shape[1:])} in {where}"
          f"{note.get(kind, '') if not arguments[2:] else ''}")


def conditions(kind: str, spec: dict, given: str | None):
    """A function of the images' index [n]: the sampler's last arguments, their conditions.

    given: the third argument of the command.
    """
    if given is not None and kind not in ("class", "vector"):
        refuse(f"CLASSES is {given!r}, and this model has no classes: leave it out")
    if kind == "text":
        # A text encoder's states, followed by zeros, and a mask that is true at the text's tokens.
        # A mask that is true nowhere is the null caption.
        shape = spec["text_tokens"], spec["text_width"]
        return lambda index: (np.zeros((len(index), *shape), np.float16),
                              np.zeros((len(index), shape[0]), bool))
    if kind == "vector":
        mean, std = np.array(spec["condition_mean"]), np.array(spec["condition_std"])
        vector = np.zeros(len(mean)) if given is None else (
            numbers(given, len(mean)) - mean) / std
        return lambda index: (np.tile(vector.astype(np.float32), (len(index), 1)),)
    if kind == "class":
        names = spec.get("class_names") or []
        names = [*names, *map(str, range(spec["num_classes"]))]
        chosen = given.split(",") if given is not None else names[-spec["num_classes"]:]
        for name in chosen:
            if name not in names:
                refuse(f"CLASSES has {name!r}: expected of {', '.join(names[:40])}")
        labels = np.array([names.index(name) % spec["num_classes"] for name in chosen], np.int32)
        return lambda index: (labels[index % len(labels)],)  # each in turn
    return lambda index: (np.zeros(len(index), np.int32),)  # ignored: there is no condition


def numbers(text: str, count: int) -> np.ndarray:
    """So many numbers, separated by commas."""
    try:
        return np.array([float(number) for number in text.split(",")]).reshape(count)
    except ValueError:
        refuse(f"CONDITION is {text!r}: expected {count} numbers, separated by commas, in the "
               "units of the training conditions")


def integer(name: str, text: str, low: int, high: int) -> int:
    if not (text.isdecimal() and low <= int(text) <= high):
        refuse(f"{name} is {text!r}: expected a whole number from {low} to {high}")
    return int(text)


def write_pngs(images: np.ndarray) -> None:
    folder = pathlib.Path("samples")
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            folder / f"{i:06d}.png")


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])

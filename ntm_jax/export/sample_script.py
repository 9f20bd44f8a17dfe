"""Images of this model: python sample.py [NUMBER [SEED]] writes samples.npz. Needs jax, numpy, safetensors and flatbuffers.

The files that it uses are verified first, against the SHA-256 digests in config.json. README.md shows the same in a few lines,
without these checks.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import sys

import jax.export
import numpy as np
import safetensors.numpy

FOLDER = pathlib.Path(__file__).parent
OUT = "samples.npz"
BATCH = 100  # images that are made at a time
ARGUMENTS = (("NUMBER", 1, 1_000_000), ("SEED", 0, 2**32 - 1))  # the least and the largest of each
REMEDY = "copy the folder again from where it came, or export the run anew"


class Mistake(Exception):
    """What ends the program with one line and status 2."""


def main(arguments: list[str]) -> None:
    if len(arguments) > 2:
        raise Mistake(f"{len(arguments)} arguments are given: expected at most two, python sample.py [NUMBER [SEED]]")
    given = [whole(text, *bounds) for text, bounds in zip(arguments, ARGUMENTS, strict=False)]
    about = read_config()
    number, seed = given + [16, about["config"]["seed"] % 2**32][len(given):]
    parameters = jax.device_put(safetensors.numpy.load(verified("model.safetensors", about["files"])))
    sampler = jax.export.deserialize(bytearray(verified("sampler.bin", about["files"])))
    images = sample(sampler, parameters, about, number, seed)
    write(images)
    print(f"{number} images {images.dtype}{list(images.shape[1:])} in {OUT}")


def sample(sampler, parameters: dict, about: dict, number: int, seed: int) -> np.ndarray:
    """[number, H, W, C]: integers from 0 to spec.levels - 1, or float32 latents where spec.levels is 0."""
    batch, run, parts = min(number, BATCH), jax.jit(sampler.call), []
    for start in range(0, number, batch):
        index = np.arange(start, start + batch, dtype=np.int32)  # image i of a seed is the same image in any company
        parts.append(np.asarray(run(parameters, np.uint32(seed), index, *condition(about, index))))
    images = np.concatenate(parts)[:number]
    spec = about["spec"]
    if spec["mean"]:  # the model's latents have mean 0 and variance 1 by channel: as the autoencoder made them
        images = images * np.float32(spec["std"]) + np.float32(spec["mean"])
    return images


def condition(about: dict, index: np.ndarray) -> tuple[np.ndarray, ...]:
    """What the model is told of the images `index` [n]: change it to choose what they show."""
    kind, spec, number = about["config"]["model"]["condition"], about["spec"], len(index)
    if kind == "text":  # a text encoder's states, zeros behind, and true on a text's own tokens; no such token: the null caption
        return np.zeros((number, spec["text_tokens"], spec["text_width"]), np.float16), np.zeros((number, spec["text_tokens"]), bool)
    if kind == "class":
        return (index % spec["num_classes"],)  # each class in turn
    return (np.zeros(number, np.int32),)  # the model is told nothing


def whole(text: str, name: str, low: int, high: int) -> int:
    """An argument as a number."""
    if not re.fullmatch("[0-9]{1,12}", text) or not low <= int(text) <= high:
        shown = ascii(text if len(text) <= 40 else f"{text[:37]}...")
        raise Mistake(f"{name} is {shown}: expected a whole number from {low} to {high}")
    return int(text)


def read_config() -> dict:
    """config.json, verified by the digest of its own that it holds."""
    path = FOLDER / "config.json"
    try:
        about = json.loads(read(path))
        seal = about.pop("content_sha256")
        intact = seal == hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError):  # it is no JSON, or no such object
        intact = False
    if not intact:
        raise Mistake(f"{path} was damaged or edited: its content does not match its checksum; {REMEDY}")
    return about


def verified(name: str, digests: dict) -> bytes:
    """A file's content."""
    content = read(FOLDER / name)
    if hashlib.sha256(content).hexdigest() != digests[name]:
        raise Mistake(f"{FOLDER / name} was damaged or edited: its SHA-256 is not the one in config.json; {REMEDY}")
    return content


def read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}): {REMEDY}") from None


def write(images: np.ndarray) -> None:
    """Writes OUT in the current folder, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, images=images)
    part = f".part-{OUT}-{os.getpid()}"
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, OUT)
    except OSError as error:
        raise Mistake(f"{OUT} cannot be written here ({error.strerror}): run this in a folder that you may write to, on a disk with "
                      "space left") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)

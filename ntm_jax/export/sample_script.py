"""Samples this model: python sample.py [NUMBER [SEED [CLASSES]]] writes samples.npz and PNG files.

CLASSES, by name or number and separated by commas, are shown in turn: python sample.py 8 0 cat,dog.
A model of vectors takes in their place a CONDITION, numbers in its own units: 16 0 1.5,-2.
Images of 1 or 3 channels are also written to the folder samples/. Needs jax, numpy, safetensors and
flatbuffers. The files are first compared with their SHA-256 digests in config.json. README.md shows
the same in a few lines, without this check.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import struct
import sys
import zipfile
import zlib

import jax.export
import numpy as np
import safetensors.numpy

FOLDER = pathlib.Path(__file__).parent
OUT = "samples.npz"
PNGS = pathlib.Path("samples")
MARK = b"Software\0sample.py of ntm_jax"  # a text in the PNG files, by which they are known
BATCH = 100  # the number of images made at a time
ARGUMENTS = (  # name, least and largest value
    ("NUMBER", 1, 1_000_000),
    ("SEED", 0, 2**32 - 1))
REMEDY = "copy the folder again from where it came, or export the run anew"


class Mistake(Exception):
    """An error that ends the program with one line and status 2."""


def main(arguments: list[str]) -> None:
    if len(arguments) > 3:
        raise Mistake(f"{len(arguments)} arguments are given: expected at most three, "
                      "python sample.py [NUMBER [SEED [CLASSES or CONDITION]]]")
    given = [integer(text, *bounds) for text, bounds in zip(arguments, ARGUMENTS, strict=False)]
    about = read_config()
    kind, chosen = about["config"]["model"]["condition"], None
    if arguments[2:]:
        parse = parse_vector if kind == "vector" else parse_classes
        chosen = parse(arguments[2], about)
    spec = about["spec"]
    has_pngs = spec["levels"] and spec["image_shape"][-1] in (1, 3)
    keep_others([pathlib.Path(OUT), *(earlier_pngs() if has_pngs else [])])
    number, seed = given + [16, about["config"]["seed"] % 2**32][len(given):]
    weights = safetensors.numpy.load(read_verified("model.safetensors", about["files"]))
    parameters = jax.device_put(weights)
    sampler = jax.export.deserialize(bytearray(read_verified("sampler.bin", about["files"])))
    images = sample(sampler, parameters, about, number, seed, chosen)
    write(images)
    pngs = write_pngs(images, spec["levels"]) if has_pngs else ""
    note = {"text": ", without a caption",
            "vector": ", at the mean of the training conditions"}.get(kind, "")
    note = note if chosen is None else ""
    print(f"{number} images {images.dtype}{list(images.shape[1:])} in {OUT}{pngs}{note}")


def sample(sampler, parameters: dict, about: dict, number: int, seed: int,
           chosen=None) -> np.ndarray:
    """Images [number, H, W, C]: integers 0..spec.levels-1, or float32 latents if that is 0.

    Of an array, rows [number, D] in their own units, float64.
    """
    batch, run, parts = min(number, BATCH), jax.jit(sampler.call), []
    for start in range(0, number, batch):
        # Image i of a seed is the same image in any batch.
        index = np.arange(start, start + batch, dtype=np.int32)
        arguments = (np.uint32(seed), index, *condition(about, index, chosen))
        parts.append(np.asarray(run(parameters, *arguments)))
    images = np.concatenate(parts)[:number]
    spec = about["spec"]
    if spec["mean"]:
        # The model's latents have mean 0 and variance 1 by channel; these are the autoencoder's.
        # An array's columns may vary by less than float32 resolves.
        dtype = np.float64 if spec["columns"] else np.float32
        images = images * dtype(spec["std"]) + dtype(spec["mean"])
    return images


def parse_classes(text: str, about: dict) -> np.ndarray:
    """The labels of classes given by name or number, separated by commas."""
    names, classes = about["spec"].get("class_names", []), about["spec"]["num_classes"]
    if about["config"]["model"]["condition"] != "class":
        raise Mistake(f"CLASSES is {text!r}, and this model has no classes: leave it out")
    labels = []
    for name in text.split(","):
        if name in names:
            labels.append(names.index(name))
        elif re.fullmatch("[0-9]{1,9}", name) and int(name) < classes:
            labels.append(int(name))
        else:
            expected = ", ".join([*names[:20], f"0 to {classes - 1}"])
            raise Mistake(f"CLASSES has {ascii(name)[:40]}: expected of {expected}")
    return np.array(labels, np.int32)


def parse_vector(text: str, about: dict) -> np.ndarray:
    """A condition [E], given by numbers in its own units and separated by commas, standardised."""
    spec = about["spec"]
    mean, std = np.array(spec["condition_mean"]), np.array(spec["condition_std"])
    try:
        values = np.array([float(number) for number in text.split(",")])
    except ValueError:
        values = np.zeros(0)
    if values.shape == mean.shape:
        with np.errstate(over="ignore"):
            found = ((values - mean) / std).astype(np.float32)
        if np.isfinite(found).all():
            return found
    shown = ascii(text if len(text) <= 40 else f"{text[:37]}...")
    raise Mistake(f"CONDITION is {shown}: expected {len(mean)} numbers, separated by commas, in "
                  "the units of the training conditions")


def condition(about: dict, index: np.ndarray, chosen=None) -> tuple[np.ndarray, ...]:
    """The condition of the images `index` [n]: `chosen` labels in turn, or a vector [E]."""
    kind, spec, number = about["config"]["model"]["condition"], about["spec"], len(index)
    if kind == "text":
        # A text encoder's states, followed by zeros, and a mask that is true at the text's tokens.
        # A mask that is true nowhere is the null caption.
        tokens, width = spec["text_tokens"], spec["text_width"]
        return np.zeros((number, tokens, width), np.float16), np.zeros((number, tokens), bool)
    if kind == "vector":
        # Standardised by spec["condition_mean"] and spec["condition_std"]: their mean is 0.
        vector = np.zeros(spec["condition_width"], np.float32) if chosen is None else chosen
        return (np.tile(vector, (number, 1)),)
    if kind == "class":
        labels = np.arange(spec["num_classes"], dtype=np.int32) if chosen is None else chosen
        return (labels[index % len(labels)],)  # each class in turn
    return (np.zeros(number, np.int32),)  # ignored: the model has no condition


def integer(text: str, name: str, low: int, high: int) -> int:
    """The argument called `name` as an integer from low to high."""
    if not re.fullmatch("[0-9]{1,12}", text) or not low <= int(text) <= high:
        shown = ascii(text if len(text) <= 40 else f"{text[:37]}...")
        raise Mistake(f"{name} is {shown}: expected a whole number from {low} to {high}")
    return int(text)


def read_config() -> dict:
    """The content of config.json, verified by the digest that it holds."""
    path = FOLDER / "config.json"
    try:
        about = json.loads(read(path))
        digest = about.pop("content_sha256")
        content = json.dumps(about, sort_keys=True).encode()
        intact = digest == hashlib.sha256(content).hexdigest()
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError):
        intact = False  # it is not JSON, or not such an object
    if not intact:
        raise Mistake(f"{path} was damaged or edited: its content does not match its checksum; "
                      f"{REMEDY}")
    return about


def read_verified(name: str, digests: dict) -> bytes:
    """The content of a file of this folder, compared with its digest."""
    content = read(FOLDER / name)
    if hashlib.sha256(content).hexdigest() != digests[name]:
        raise Mistake(f"{FOLDER / name} was damaged or edited: its SHA-256 is not the one in "
                      f"config.json; {REMEDY}")
    return content


def read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}): {REMEDY}") from None


def keep_others(paths: list[pathlib.Path]) -> None:
    """Raises Mistake where one of the files exists and this script did not write it."""
    for path in paths:
        try:
            if path == pathlib.Path(OUT):
                with zipfile.ZipFile(path) as archive:
                    own = archive.namelist() == ["images.npy"]
            else:
                own = MARK in path.read_bytes()[:100]
        except FileNotFoundError:
            continue
        except (OSError, zipfile.BadZipFile):
            own = False
        if not own:
            raise Mistake(f"{path} was not written by this script, which would replace it: run "
                          "this in another folder, or move it away")


def earlier_pngs() -> list[pathlib.Path]:
    """The files in the folder samples/ that have the names of PNG files of this script."""
    return sorted(PNGS.glob("[0-9]" * 6 + ".png"))


def write(images: np.ndarray) -> None:
    """Writes samples.npz in the current folder, completely or not at all."""
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
        raise Mistake(f"{OUT} cannot be written here ({error.strerror}): run this in a folder that "
                      "you may write to, on a disk with space left") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def write_pngs(images: np.ndarray, levels: int) -> str:
    """Writes PNG files of pixels of 1 or 3 channels; says where, for the last line."""
    shown = np.rint(images * (255 / (levels - 1))).astype(np.uint8)
    try:
        PNGS.mkdir(exist_ok=True)
        for i, image in enumerate(shown):
            (PNGS / f"{i:06d}.png").write_bytes(png(image))
        for earlier in earlier_pngs():  # of a call for more images
            if int(earlier.stem) >= len(shown):
                earlier.unlink()
    except OSError as error:
        raise Mistake(f"{PNGS} cannot be written here ({error.strerror}): {OUT} is complete; run "
                      "this in another folder for the PNG files") from None
    return f" and {PNGS}/"


def png(image: np.ndarray) -> bytes:
    """The PNG file of an image [H, W, C] uint8."""
    height, width, channels = image.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))

    rows = np.pad(image.reshape(height, -1), ((0, 0), (1, 0)))  # each row begins with filter 0
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tEXt", MARK) + chunk(
        b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)

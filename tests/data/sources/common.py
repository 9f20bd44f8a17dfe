"""Helpers for the tests of sources: writing images and reading records."""

from PIL import Image


def save(path, value, size=(8, 8), mode="RGB"):
    """Writes an image of one colour, H x W `size`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], value).save(path)


def values(source):
    """The first pixel of every record."""
    return [int(source.records[i]["image"].flat[0]) for i in range(len(source.records))]


def labels(source):
    """The label of every record."""
    return [source.records[i]["label"] for i in range(len(source.records))]

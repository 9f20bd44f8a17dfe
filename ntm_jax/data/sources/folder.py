"""The source `folder:PATH`: a folder of image files, with captions if a list of them is there.

Splits: train and test are the sub-folders of these names, if both exist; otherwise a fixed
permutation of the sorted files is cut after 90%. The layouts train/CLASS/ and train/ with val/ are
refused without test/. Classes: the sub-folders (of train/ and test/ taken together), sorted by
name, if every image lies in one. Links to folders and files are followed, and every folder is
walked once. Only regular files are read, of at most 256 MiB. Images have one size unless
data.image_size sets it, and are grey if all are grey. Up to 1% of the images, or one, may be
damaged: these are left out, before the splits are cut. Captions: those of metadata.jsonl or
metadata.csv in the folder, a row for every image; see launch/prepare.py for its columns. Without
such a list, those of a.txt beside a.png, for every image. Those that are not UTF-8 count as empty.
The list's column `rejected` names an image that was judged worse with the same caption; then the
images that have one are the records. No jax is imported: grain's worker processes run this.
"""

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from etils import epath
from PIL import UnidentifiedImageError
from tqdm import tqdm

from ntm_jax.data import caption_lists, images
from ntm_jax.data.sources.source import Lazy, Source, check_split, permuted_splits
from ntm_jax.errors import UserError, few, from_object_storage
from ntm_jax.files import expanded, is_remote, parse_object, read, stat, write_json

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MANIFEST = ".ntm_manifest.json"
# Of a folder with more files, only a sample is decoded when it is opened, and no .txt is read.
_SCAN_LIMIT = 50_000
_MAX_BAD = 0.01  # the largest share of damaged images
_SAMPLE = 256  # files in that sample, evenly spread, which determines grey or colour and the size


def _record(
    root: epath.Path, channels: int, columns: dict[str, Sequence | None], index: int
) -> dict[str, Any]:
    """A row of the columns name, label, caption and rejected, with the images of its files."""
    record = {key: values[index] for key, values in columns.items() if values is not None}
    record["image"] = _image(root / record["name"], channels)
    if "rejected" in record:
        record["rejected"] = _image(root / record["rejected"], channels)
    return record


def _image(path: epath.Path, channels: int) -> np.ndarray:
    try:
        image = images.decode(read(path))
    except Exception as error:  # PIL raises a dozen kinds on a damaged file
        if from_object_storage(error):
            raise
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"image {path} cannot be decoded ({reason}): remove it") from error
    return np.repeat(image, 3, -1) if image.shape[-1] < channels else image


def open_folder(where: str, split: str) -> Source:
    """Opens a split of the images in the folder `where`.

    UserError if too many cannot be decoded.
    """
    root = epath.Path(where).expanduser()
    if not root.is_dir():
        raise UserError(f"data.source folder:{where} is not there: expected a folder of images")
    presplit = _presplit(root, where)
    parts = ("train", "test") if presplit else ("",)
    files, described = list_images(root, parts)
    if not files:
        raise UserError(
            f"data.source folder:{where} holds no images: expected files ending in "
            f"{', '.join(_SUFFIXES)}"
        )
    scanned, bad = _scan(root, files)
    listed, pairs = caption_lists.listed(root)
    files = [file for file in files if file not in bad and (not pairs or file in pairs)]
    missing = [file for file in files if file not in (listed or described)]
    captions = None if missing else _captions(root, files, listed)
    rejected = [pairs[file] for file in files] if pairs else None
    if presplit:
        in_train = np.array([file.startswith("train/") for file in files], bool)
        train, test = np.flatnonzero(in_train), np.flatnonzero(~in_train)
        splits = {"train": train, "test": test, "all": np.concatenate([train, test])}
    else:
        splits = permuted_splits(len(files), len(files) * 9 // 10)
    check_split(f"folder:{where}", split, splits)

    folders = [file.split("/")[presplit:-1] for file in files]
    names = sorted({folder[0] for folder in folders}) if all(folders) else []
    places = {name: place for place, name in enumerate(names)}
    labels = [places[folder[0]] if names else -1 for folder in folders]
    columns = {"name": files, "label": labels, "caption": captions, "rejected": rejected}
    channels = max(entry[-1] for entry in scanned.values())
    sizes = {}  # the first file of each size
    for file in (files[row] for row in splits[split]):
        if file in scanned:
            sizes.setdefault(tuple(scanned[file][2:4]), file)
    several = [f"{file} is {height}x{width}" for (height, width), file in sizes.items()]
    content = [[file, scanned[file][0] if file in scanned else None] for file in files]
    content += [values for values in (captions, rejected) if isinstance(values, list)]
    notes = []
    if bad:
        notes += [f"{len(bad)} of {len(files) + len(bad)} images cannot be decoded and are left "
                  f"out: {few(sorted(bad), 3)}"]
    if (listed or described) and missing:
        notes += [f"captions are not used, since there is no {'row' if listed else '.txt'} for "
                  f"{len(missing)} images: {few(missing, 3)}"]
    return Source(
        Lazy(functools.partial(_record, root, channels, columns), range(len(files))),
        cast(tuple[int, int, int], (*next(iter(sizes), (None, None)), channels)),  # see Source
        pixel_levels=256,
        num_classes=len(names),
        class_names=tuple(names),
        version=hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16],
        captions=captions,
        rows=splits[split],
        mixed_sizes=", ".join(several[:2]) if len(several) > 1 else "",
        notes="; ".join(notes),
    )


def _presplit(root: epath.Path, where: str) -> bool:
    """Whether train/ and test/ are the splits.

    Raises UserError for train/ without test/ where they would become classes and are none.
    """
    train, test = ((root / part).is_dir() for part in ("train", "test"))
    if train and not test:
        _, folders, _ = next((root / "train").walk())
        others = [root / name for name in ("val", "valid", "validation")]
        if any(name[0] != "." for name in folders) or any(other.is_dir() for other in others):
            raise UserError(
                f"data.source folder:{where} holds train/ and no test/: rename or link a folder "
                f"such as val/ to test/, or give folder:{where}/train for all of its images; "
                "rename train/ if it is a class"
            )
    return train and test


def list_images(root: epath.Path, parts: Sequence[str] = ("",)) -> tuple[list[str], set[str]]:
    """(paths, relative to `root`, of the images in its folders `parts`; those with a .txt beside).

    Sorted; see _walk.
    """
    names = {name for part in parts for name in _walk(root, part)}
    files = sorted(name for name in names if not name.endswith(".txt"))
    return files, {file for file in files if caption_lists.text_beside(file) in names}


def _captions(root: epath.Path, files: list[str], listed: dict[str, str]) -> Sequence[str]:
    """The captions of files: as listed, or those of the .txt beside each."""
    if listed:
        return [listed[file] for file in files]
    captions = Lazy(functools.partial(caption_lists.read_beside, root), files)
    if len(files) > _SCAN_LIMIT:
        return captions
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(captions.get, files))


def _walk(root: epath.Path, part: str) -> list[str]:
    """Paths, relative to `root`, of the images and .txt files in its folder `part` and below.

    Links to files and folders are followed. Every folder is walked once: links may form loops.
    Hidden files and folders are left out.
    """
    def refuse(error: OSError):
        raise error

    found, walked, top = [], set(), root / part
    tree = top.walk() if is_remote(top) else os.walk(top, onerror=refuse, followlinks=True)
    for here, folders, names in tree:
        place = os.path.realpath(here)
        if place in walked:
            folders.clear()
            continue
        walked.add(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        # Links come last, so that a folder has its own name rather than a link's.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(here, name)), name))
        before = os.path.relpath(*(os.fspath(path).rpartition("://")[2] for path in (here, root)))
        found += [os.path.normpath(os.path.join(before, name)) for name in names
                  if name[0] != "." and (name.lower().endswith(_SUFFIXES) or name[-4:] == ".txt")]
    return found


def _scan(root: epath.Path, files: Sequence[str]) -> tuple[dict[str, list[int]], set[str]]:
    """({file: [bytes, mtime, H, W, C]}, the files that cannot be decoded).

    Of many files only a sample is decoded. A manifest keeps what was found: in the folder, or in
    the user's cache where the folder is read-only.

    Raises:
      UserError: too many files cannot be decoded; it names the first few.
    """
    files = files[:: 1 if len(files) <= _SCAN_LIMIT else len(files) // _SAMPLE]
    manifest, cached = root / _MANIFEST, {}
    home = expanded("~")  # itself where the user has none
    if not is_remote(root) and not os.access(root, os.W_OK) and os.path.isabs(home):
        digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
        manifest = epath.Path(home) / ".cache" / "ntm_jax" / f"{digest}.json"
    # If it is absent, unreadable or damaged, the images are scanned again.
    with contextlib.suppress(OSError, ValueError):
        cached = parse_object(read(manifest))

    def inspect(file: str) -> list[int] | None:
        try:
            known = [*stat(root / file)]
            found = cached.get(file, [])
            if found[:2] == known:
                return found
            shape = images.decode(read(root / file)).shape
            return [*known, *shape]
        except Exception as error:  # PIL raises a dozen kinds on a damaged file
            if getattr(error, "errno", None) == errno.EMFILE or from_object_storage(error):
                raise
            return None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        found, title = pool.map(inspect, files), f"checking the images of {root}"
        entries = dict(zip(files, tqdm(found, title, len(files), disable=None, delay=1),
                           strict=True))
    scanned = {file: entry for file, entry in entries.items() if entry}
    bad = [file for file in files if file not in scanned]
    allowed = max(1, int(_MAX_BAD * len(files)))
    if len(bad) > allowed or not scanned:
        raise UserError(
            f"{len(bad)} of {len(files)} images in {root} cannot be decoded ({few(bad, 3)}): "
            f"remove them; at most {allowed} are left out"
        )
    if scanned != cached:
        with contextlib.suppress(OSError):
            manifest.parent.mkdir(parents=True, exist_ok=True)
            write_json(manifest, scanned)
    return scanned, set(bad)

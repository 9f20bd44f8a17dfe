"""The source `folder:PATH`: a folder of image files, with captions if a list of them is there.

Splits: train and test are the sub-folders of these names, if both exist; otherwise a fixed
permutation of the sorted files is cut after 90%. The layouts train/CLASS/ and train/ with val/ are
refused without test/. Classes: the sub-folders (of train/ and test/ taken together), sorted by
name, if every image lies in one. Links to folders and files are followed, and every folder is
walked once. Only regular files are read, of at most 256 MiB. Images have one size unless
data.image_size sets it, and are grey if all are grey. Up to 1% of the images, or one, may be
damaged: these are left out, before the splits are cut. Captions: those of metadata.jsonl or
metadata.csv in the folder, if it has one for every image; see launch/prepare.py for its columns.
Those that are not UTF-8 count as empty. Its column `rejected` names an image that was judged worse
with the same caption; then the images that have one are the records. No jax is imported: grain's
worker processes run this.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from etils import epath
from PIL import UnidentifiedImageError
from tqdm import tqdm

from ntm_jax.data import caption_lists, images, text
from ntm_jax.data.sources.source import Source, check_split, permuted_splits
from ntm_jax.errors import UserError, few
from ntm_jax.files import is_remote, parse_object, write_json

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_THIRD = ("val", "valid", "validation")  # folders that others hold out beside or in place of test/
_MANIFEST = ".ntm_manifest.json"
_CACHE = Path.home() / ".cache" / "ntm_jax"
_SCAN_LIMIT = 50_000  # of a folder with more files, only a sample is decoded when it is opened
_MAX_BAD = 0.01  # the largest share of damaged images
_SAMPLE = 256  # files in that sample, evenly spread, which determines grey or colour and the size


@dataclasses.dataclass(frozen=True)
class _Files:
    """Image files under `root`, decoded when read."""

    root: epath.Path
    files: Sequence[str]
    labels: Sequence[int]
    channels: int
    captions: Sequence[str] | None
    rejected: Sequence[str] | None = None  # files that were judged worse, one for each file

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = {"image": self._image(self.files[index]), "label": self.labels[index]}
        record["name"] = self.files[index]
        if self.captions is not None:
            record["caption"] = self.captions[index]
        if self.rejected is not None:
            record["rejected"] = self._image(self.rejected[index])
        return record

    def _image(self, file: str) -> np.ndarray:
        path = self.root / file
        try:
            image = images.decode(images.read(path))
        except Exception as error:  # PIL raises a dozen kinds on a damaged file
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(f"image {path} cannot be decoded ({reason}): remove it") from error
        if image.shape[-1] > self.channels:
            raise UserError(
                f"image {path} has colours where the {_SAMPLE} images looked at first are all "
                "grey: make it grey"
            )
        if image.shape[-1] < self.channels:
            image = np.repeat(image, self.channels, axis=-1)
        return image


def open_folder(where: str, split: str) -> Source:
    """Opens a split of the images in the folder `where`.

    UserError if too many cannot be decoded.
    """
    root = epath.Path(where).expanduser()
    if not root.is_dir():
        raise UserError(f"data.source folder:{where} is not there: expected a folder of images")
    presplit = _presplit(root, where)
    parts = ("train/", "test/") if presplit else ("",)
    files = sorted(file for part in parts for file in _walk(root / part, part))
    if not files:
        raise UserError(
            f"data.source folder:{where} holds no images: expected files ending in "
            f"{', '.join(_SUFFIXES)}"
        )
    every = 1 if len(files) <= _SCAN_LIMIT else len(files) // _SAMPLE
    scanned, bad = _scan(root, files[::every])
    listed, rejected = caption_lists.listed(root)
    absent = sorted(set(listed or ()) - {*files, *bad})
    files = _without_rejected([file for file in files if file not in bad], rejected, where)
    splits = _splits(files, presplit)
    check_split(f"folder:{where}", split, splits)
    captions, no_captions, not_utf8 = _captions(listed, files)

    channels = max(entry[-1] for entry in scanned.values())
    chosen = [files[row] for row in splits[split]]
    sizes = {file: tuple(scanned[file][2:4]) for file in chosen if file in scanned}
    different = {size: file for file, size in reversed(sizes.items())}  # the first file of each
    size = next(iter(sizes.values()), (None, None))
    several = [f"{file} is {height}x{width}" for (height, width), file in different.items()]
    mixed = ", ".join(several[:2]) if len(several) > 1 else ""

    folders = [file.split("/")[presplit:-1] for file in files]
    names = sorted({folder[0] for folder in folders}) if all(folders) else []
    classes = {name: label for label, name in enumerate(names)}
    labels = [classes[folders[row][0]] if classes else -1 for row in splits[split]]
    content: list = [(file, scanned[file][0] if file in scanned else None) for file in files]
    if captions:
        content.append(captions)
    if rejected:
        content.append([rejected[file] for file in files])
    own = [captions[row] for row in splits[split]] if captions else None
    sides = [min(shape[2:4]) for shape in scanned.values()]
    return Source(
        _Files(root, chosen, labels, channels, own,
               [rejected[file] for file in chosen] if rejected else None),
        cast(tuple[int, int, int], (*size, channels)),  # H and W may be None, see Source
        pixel_levels=256,
        num_classes=len(classes),
        class_names=tuple(names),
        version=hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16],
        captions=own,
        no_captions=no_captions,
        mixed_sizes=mixed,
        typical_side=int(np.median(sides)) if mixed else 0,
        skipped="; ".join(filter(None, (
            _count(bad, len(files) + len(bad), "images cannot be decoded and are left out"),
            _count(absent, len(listed or ()), "rows of its list name no image there"),
            _count(not_utf8, len(files), "captions are not UTF-8 and count as empty")))),
    )


def _presplit(root: epath.Path, where: str) -> bool:
    """Whether train/ and test/ are the splits.

    Raises UserError for train/ without test/ where they would become classes and are none.
    """
    train, test = ((root / part).is_dir() for part in ("train", "test"))
    if not train or test:
        return train and test
    if any((root / name).is_dir() for name in _THIRD) or any(
        kind != "file" for _, kind in _entries(root / "train")
    ):
        raise UserError(
            f"data.source folder:{where} holds train/ and no test/: rename or link a folder such "
            f"as val/ to test/, or give folder:{where}/train for all of its images; rename train/ "
            "if it is a class"
        )
    return False


def _captions(
    found: dict[str, str] | None, files: Sequence[str]
) -> tuple[list[str] | None, str, list[str]]:
    """(the captions of the files, None without one for each; why there are none; bad captions).

    found: the captions of a list; None without a list. Captions that are not UTF-8 become empty;
    their files are returned.
    """
    if found is None:
        return None, f"there is no {' or '.join(caption_lists.LISTS)} in it", []
    missing = [file for file in files if file not in found]
    if missing:
        return None, f"the list in it has no row for {len(missing)} images: {few(missing, 3)}", []
    bad = {file for file in files if not text.is_utf8(found[file])}
    return ["" if file in bad else found[file] for file in files], "", sorted(bad)


def _without_rejected(files: list[str], rejected: dict[str, str], where: str) -> list[str]:
    """The files that are records: without pairs all, otherwise those with a rejected image.

    Raises UserError for a pair whose rejected image is not there.
    """
    if not rejected:
        return files
    known = set(files)
    kept = [file for file in files if file in rejected]
    missing = [rejected[file] for file in kept if rejected[file] not in known]
    if missing or not kept:
        raise UserError(
            f"data.source folder:{where} has a list of rejected images, and {few(missing, 3)} of "
            "it cannot be decoded or is not there: mend the list"
        )
    return kept


def _splits(files: Sequence[str], presplit: bool) -> dict[str, np.ndarray]:
    """{split: indices of `files`}."""
    if not presplit:
        return permuted_splits(len(files), len(files) * 9 // 10)
    is_train = np.array([file.startswith("train/") for file in files])
    train, test = np.flatnonzero(is_train), np.flatnonzero(~is_train)
    return {"train": train, "test": test, "all": np.concatenate([train, test])}


def _walk(folder: epath.Path, prefix: str) -> list[str]:
    """Paths of the image files under `folder`, relative to it and with `prefix` in front.

    Hidden files are left out; links to files and folders are followed. Every folder is walked once,
    under its own name if it is also reached without a link: links may form loops.
    """
    found, walked = [], set()
    pending = collections.deque([(folder, prefix)])  # folders behind links come after all others
    while pending:
        here, before = pending.popleft()
        place = os.fspath(here) if is_remote(here) else os.path.realpath(here)
        if place in walked:
            continue
        walked.add(place)
        for name, kind in sorted(_entries(here)):
            if kind == "file":
                found += [before + name] if name.lower().endswith(_SUFFIXES) else []
                continue
            add = pending.append if kind == "linked folder" else pending.appendleft
            add((here / name, f"{before}{name}/"))
    return found


def _entries(folder: epath.Path) -> Iterator[tuple[str, str]]:
    """(name, 'file', 'folder' or 'linked folder') of every visible entry of a folder."""
    if is_remote(folder):
        for path in folder.iterdir():
            if not path.name.startswith("."):
                is_file = path.name.lower().endswith(_SUFFIXES) or not path.is_dir()
                yield path.name, "file" if is_file else "folder"
        return
    with os.scandir(folder) as entries:  # distinguishes files from folders without a call for each
        for entry in entries:
            kind = "folder" if entry.is_dir(follow_symlinks=False) else "file"
            if entry.is_symlink() and os.path.isdir(entry):
                kind = "linked folder"
            if not entry.name.startswith("."):
                yield entry.name, kind


def _count(names: Collection[str], total: int, what: str) -> str:
    """"3 of `total` `what`: the names"; '' without names."""
    return f"{len(names)} of {total} {what}: {few(sorted(names), 3)}" if names else ""


# Scanning: every file is decoded once, and a manifest keeps what was found.


def _scan(root: epath.Path, files: Sequence[str]) -> tuple[dict[str, list[int]], set[str]]:
    """({file: [bytes, mtime, H, W, C]}, the files that cannot be decoded).

    Decodes only files that the folder's manifest lacks.

    Raises:
      UserError: too many files cannot be decoded; it names the first few.
    """

    def inspect(file: str) -> list[int] | None:
        try:
            stat = (root / file).stat()
            found = cached.get(file, [])
            if found[:2] == [stat.length, stat.mtime]:
                return found
            shape = images.decode(images.read(root / file)).shape
            return [stat.length, stat.mtime, *shape]
        except Exception:  # PIL raises a dozen kinds on a damaged file
            return None

    cached = _read_manifest(root)
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
        _write_manifest(root, scanned)
    return scanned, set(bad)


def _manifests(root: epath.Path) -> list[epath.Path]:
    """The manifest's place in the folder, and in the user's cache if the folder is read-only."""
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return [root / _MANIFEST, epath.Path(_CACHE) / f"{digest}.json"]


def _read_manifest(root: epath.Path) -> dict[str, list[int]]:
    for path in _manifests(root):
        # If it is absent, unreadable or damaged, the images are scanned again.
        with contextlib.suppress(OSError, ValueError):
            return parse_object(path.read_bytes())
    return {}


def _write_manifest(root: epath.Path, entries: dict[str, list[int]]) -> None:
    for path in _manifests(root):
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, entries)
            return

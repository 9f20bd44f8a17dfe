"""From a source's records to this process's batches of tokens, with grain.

Training batches are shuffled and endless; evaluation batches are in order and hold every record
exactly once. B global batch, b = B / processes this process's share, N tokens, D token channels, M
text tokens, E their width. No jax is imported: grain's worker processes import this file.
"""

import contextlib
import dataclasses
import os
import weakref
from collections.abc import Generator, Mapping, Sequence
from typing import Any, cast

import grain
import grain.experimental
import numpy as np

from ntm_jax import files, typed
from ntm_jax.data import transforms
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.workers import out_of_reach

# Grain's default keeps 500 elements ready, and here an element is a complete batch.
_THREADS = min(8, os.cpu_count() or 1)
_READ_OPTIONS = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """The properties of the data that the model depends on.

    Those that a Source has, too, have the same names there.

    image_shape: (H, W, C).
    patch_size: the side of a patch, which divides H and W.
    pixel_levels: the number of values that a pixel can take; 0 for continuous latents.
    num_classes: 0 without labels.
    count: the number of records.
    text_tokens, text_width: M and E of the text states; 0 without text.
    text: the encoder that made the text states.
    mean, std: by channel, what latents were normalised by; empty if they were not. Of arrays, by
      column.
    class_names: the name of every class, in the order of the labels; empty if they have none.
    columns: the columns of an array, of which each record is a row; 0 for images.
    condition_width: E of the vectors that records are conditioned on; 0 without.
    condition_mean, condition_std: by number, what these vectors were normalised by.
    version: identifies the data's content; '' if unknown. The model does not depend on it.
    """

    image_shape: tuple[int, int, int]
    patch_size: int
    pixel_levels: int
    num_classes: int
    count: int
    text_tokens: int = 0
    text_width: int = 0
    text: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()
    columns: int = 0
    condition_width: int = 0
    condition_mean: tuple[float, ...] = ()
    condition_std: tuple[float, ...] = ()
    version: str = dataclasses.field(default="", compare=False)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of a record for users, (H, W, C), or (columns,) of an array."""
        return (self.columns,) if self.columns else self.image_shape

    @property
    def log_unit(self) -> float:
        """log|det| of the map from tokens to an array's own units, in nats; 0 for images."""
        return float(np.sum(np.log(self.std))) if self.columns else 0.0

    def to_tokens(self, values: np.ndarray) -> np.ndarray:
        """Records as users have them, [n, *data_shape] -> tokens [n, N, D] float32."""
        if self.columns:
            values = transforms.standardise(values, self.mean, self.std)
            values = values.reshape(-1, *self.image_shape)
        levels = self.pixel_levels
        x = transforms.scale(values, levels) if levels else values.astype(np.float32)
        return transforms.patchify(x, self.patch_size)

    def from_tokens(self, tokens: np.ndarray, own_units: bool = True) -> np.ndarray:
        """Tokens [..., N, D] -> records as users have them, [..., *data_shape].

        Pixels are uint8, latents float32, arrays float64 in their own units, or as the model has
        them, standardised in float32, with own_units=False.
        """
        values = transforms.unpatchify(tokens, self.image_shape, self.patch_size)
        if self.pixel_levels:
            return transforms.unscale(values, self.pixel_levels)
        if not self.columns:
            return values
        values = values.reshape(*values.shape[:-3], self.columns)
        if not own_units:
            return values
        return transforms.unstandardise(values, self.mean, self.std)

    @property
    def tokens(self) -> int:
        """N, the number of patches."""
        return self.image_shape[0] * self.image_shape[1] // self.patch_size**2

    @property
    def dim(self) -> int:
        """D, the channels of one token."""
        return self.patch_size**2 * self.image_shape[2]


def spec(source: Source, patch_size: int) -> DataSpec:
    """The DataSpec of `source` cut into patches. UserError if a patch does not divide the image."""
    height, width, _ = source.image_shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise UserError(
            f"data.patch_size={patch_size} does not divide the {height}x{width} images of "
            f"{source.name}: choose a divisor of both sides, or another data.image_size"
        )
    names = {field.name for field in dataclasses.fields(DataSpec)}
    shared = {name: value for name, value in vars(source).items() if name in names}
    return DataSpec(patch_size=patch_size, count=len(source.records), **shared)


def changed_data(name: str, before: str, now: str) -> str:
    """A line on the data `name`, if these two versions of them differ and are known; else ''."""
    if not before or not now or before == now:
        return ""
    return (
        f"{name} changed since the run began, from version {before!r} to {now!r}: its splits may "
        "hold other records, so held-out ones may be among those trained on"
    )


def spec_to_json(spec: DataSpec) -> dict[str, Any]:
    """A DataSpec as a JSON object; its key "levels" is `pixel_levels`."""
    fields = dataclasses.asdict(spec)
    fields["levels"] = fields.pop("pixel_levels")
    return files.to_json(fields)


def spec_from_json(values: Any, name: str = "spec") -> DataSpec:
    """The inverse of `spec_to_json`; it accepts "pixel_levels" for "levels" too.

    Args:
      name: what errors call `values`.
    Raises:
      UserError: as `typed.parse_dataclass`.
    """
    if isinstance(values, Mapping) and "levels" in values:
        values = {**values, "pixel_levels": values["levels"]}
        del values["levels"]
    return typed.parse_dataclass(DataSpec, values, name)


@dataclasses.dataclass(frozen=True)
class _ReadTokens:
    """Record index -> its example. A class, not a closure, so that it can be pickled.

    With a random generator every other image is mirrored, left to right.
    """

    source: Source
    patch_size: int

    def __call__(
        self, index: int, rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray | np.generic]:
        record = dict(self.source.records[int(index)])
        if rng is not None and rng.integers(2):
            for key in record.keys() & {"image", "rejected"}:
                record[key] = record[key][:, ::-1]
        more = {key: record[key] for key in ("text", "text_mask", "condition") if key in record}
        if "rejected" in record:
            more["rejected"] = self._tokens(record["rejected"])
        return {
            "x": self._tokens(record["image"]),
            "label": np.int32(record["label"]),
            "index": np.int32(index),
            **more,
        }

    def _tokens(self, image: np.ndarray) -> np.ndarray:
        x = transforms.patchify(image, self.patch_size)
        levels = self.source.pixel_levels
        return transforms.scale(x, levels) if levels else x


class TrainIterator:
    """Endless iterator over this process's share of training batches, reshuffled every epoch.

    Each item is {"x": [b, N, D] float32, pixels in [-1, 1] or latents, "label": [b] int32 (-1
    without labels), "index": [b] int32} and, with text, "text": [b, M, E] float16, zeros after a
    record's own tokens, and "text_mask": [b, M] bool, true on these; with vectors as conditions,
    "condition": [b, E] float32; with pairs of images, "rejected" like "x".

    The records of step s over all processes are the same for any number of processes and workers,
    but not the row in which each lies: key per-example noise by "index". An epoch may end inside a
    batch, so a batch may be larger than the source.

    Args:
      patch_size: divides both sides of an image, see `spec`.
      batch_size: global, B, a multiple of the processes.
      workers: the number of processes that read records; 0 reads in this process's threads. With
        workers absl flags must be parsed and __main__ guarded, and `source` is pickled to each of
        them.
      process_index, process_count: this process among those that share a batch.
      flip: mirrors every other image, left to right; drawn anew in each epoch from the seed.
    Raises:
      UserError: while iterating, a record cannot be read, with the same message from a thread or a
        worker process. An error is final: the state stays that of the last good batch, and every
        later `next` raises the same error.
    """

    def __init__(
        self,
        source: Source,
        patch_size: int,
        batch_size: int,
        seed: int,
        workers: int,
        process_index: int = 0,
        process_count: int = 1,
        flip: bool = False,
    ):
        # The data set is a range of indices, read by the map, because grain's own sources would
        # not give an example its record index.
        indices = grain.MapDataset.range(len(source.records))
        shuffled, read = indices.seed(seed).shuffle().repeat(), _ReadTokens(source, patch_size)
        dataset = shuffled.random_map(read) if flip else shuffled.map(read)
        processes = grain.multiprocessing.MultiprocessingOptions(num_workers=workers)
        elastic = grain.experimental.ElasticIterator(
            dataset,
            batch_size,
            grain.sharding.ShardOptions(
                shard_index=process_index, shard_count=process_count, drop_remainder=True
            ),
            read_options=_READ_OPTIONS,
            multiprocessing_options=processes if workers else None,
        )
        self._iterator = iter(elastic)
        self._error = None
        self._starting = workers > 0  # the next batch starts them
        # A grain iterator that outlives its module prints errors at exit: it is closed and dropped
        # before.
        self._finalizer = weakref.finalize(
            self, lambda attributes: attributes.pop("_iterator").close(), vars(self))

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        # After an error grain would continue with the next batch, and its state would fall one
        # batch behind the data.
        if self._error is not None:
            raise self._error
        try:
            with out_of_reach() if self._starting else contextlib.nullcontext():
                batch = next(self._iterator)
            self._starting = False
        except Exception as error:
            self._error = error
            raise
        # Batches of worker processes lie in shared memory that is unmapped with the array, which
        # would leave aliases dangling.
        return {key: np.array(value) for key, value in batch.items()}

    def get_state(self) -> dict[str, int]:
        """The position in the data as a JSON-able dict.

        It is the same in every process and for any number of processes and workers.
        """
        return self._iterator.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Moves to a state of `get_state`, taken from an iterator over the same source and seed."""
        self._error = None
        self._iterator.set_state(state)

    def close(self) -> None:
        """Ends the threads and worker processes. May be called twice; no other call may follow."""
        self._finalizer()


def evaluation_batches(
    source: Source,
    patch_size: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    chosen: Sequence[int] | None = None,
) -> Generator[dict[str, np.ndarray], None, None]:
    """This process's share of every record, or every chosen one, exactly once and in order.

    Items have the training batches' keys and "mask": [b] float32. Global batch k holds the records
    from k * batch_size on, and process p the p-th contiguous share of it, so that shares
    concatenated by process are in record order. The last batch is padded with record 0 at mask 0;
    every process gets the same number of batches.

    Args:
      batch_size: global, B, a multiple of the processes.
      process_index, process_count: this process among those that share a batch.
      chosen: the indices of the records; all by default.
    Raises:
      UserError: a record cannot be read.
    """
    share = batch_size // process_count
    chosen = range(len(source.records)) if chosen is None else chosen
    shape = -(-len(chosen) // batch_size), process_count, share
    indices = np.zeros(shape, int)
    indices.flat[: len(chosen)] = chosen
    mask = (np.arange(indices.size) < len(chosen)).astype(np.float32).reshape(shape)
    own = cast(Sequence[int], indices[:, process_index].ravel())
    dataset = grain.MapDataset.source(own).map(_ReadTokens(source, patch_size))
    iterator = iter(dataset.batch(share).to_iter_dataset(_READ_OPTIONS))
    try:
        for batch, real in zip(iterator, mask[:, process_index], strict=True):
            yield {**batch, "mask": real}
    finally:
        iterator.close()

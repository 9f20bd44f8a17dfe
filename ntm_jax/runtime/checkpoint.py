"""Checkpoints: the train state and the data iterator's state, saved as one unit in workdir/checkpoints by orbax, with a checksum for
every array, because orbax loads a flipped bit without a word. Nothing is pickled: arrays are zarr, all else is JSON."""

import contextlib
import dataclasses
import functools
import gc
import logging
import math
import os
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from ntm_jax import files
from ntm_jax.errors import UserError

DATA_NAME = "<data>"  # the data iterator's entry among the checksums; no array path has angle brackets
RUN_NAME = "<run>"  # and the entry of the step and the settings
READ_ATTEMPTS = 30  # of a reader beside a run that saves
STREAMS = (0x9E3779B9, 0x7F4A7C15)  # seeds of the two 32-bit sums


def checksums(tree) -> dict[str, str]:
    """64-bit sums of every array's bits and where they stand: {"path/of/array": 16 hex digits}.

    Each device sums the shards that it holds, without a collective, and the host adds the devices' sums. They are the same under any
    sharding on any number of devices and processes. Every process calls it alike. Any dtype of 8, 16, 32 or 64 bits (complex numbers
    excepted), any shape, any size.
    """
    leaves = named_leaves(tree)
    local = [_device_sums(leaf) for leaf in leaves.values()]  # all are dispatched before any is read
    sums = np.array([np.sum([np.asarray(shard.data) for shard in a.addressable_shards], (0, 1), np.uint32) for a in local], np.uint32)
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    return {name: f"{int(first):08x}{int(second):08x}" for name, (first, second) in zip(leaves, sums, strict=True)}


def locate(where) -> tuple[epath.Path, int | None]:
    """(workdir, step) of a run's folder or of WORKDIR/checkpoints/STEP; the step is None where it is not named."""
    folder = epath.Path(where)
    named = folder.parent.name == "checkpoints" and folder.name.isdecimal()
    return (folder.parent.parent, int(folder.name)) if named else (folder, None)


def digest(tree) -> str:
    """16 hex digits that stand for all of a tree's checksums."""
    return json_checksum(checksums(tree))


def _device_sums(x) -> jax.Array:
    """uint32 [devices, 2], one row on each device: the two sums of the shard that it holds, 0 for a second copy of the same shard."""
    x = jnp.asarray(x)
    return _sharded_sums(x, x.sharding) if isinstance(x.sharding, NamedSharding) else _sums(x)


@jax.jit  # an array at a time: compiled once a shape, where one program for a tree of 240 arrays took 6 s to compile
def _sums(x):
    """uint32 [1, 2]: both sums of an array on one device."""
    return _both_sums(x, [0] * x.ndim)[None]


@functools.partial(jax.jit, static_argnames="sharding")
def _sharded_sums(x, sharding: NamedSharding):
    mesh = sharding.mesh
    axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in (*sharding.spec, *(None,) * x.ndim)][: x.ndim]
    copied = tuple(axis for axis in mesh.axis_names if not any(axis in names for names in axes))

    def local(part):
        starts = [jax.lax.axis_index(names) * size if names else 0 for names, size in zip(axes, part.shape, strict=True)]
        first = jax.lax.axis_index(copied) == 0 if copied else True
        return jnp.where(first, _both_sums(part, starts), jnp.uint32(0))[None]

    return jax.shard_map(local, mesh=mesh, in_specs=sharding.spec, out_specs=PartitionSpec(mesh.axis_names), check_vma=False)(x)


def _both_sums(x, starts):
    return jnp.stack([_positioned_sum(x, starts, seed) for seed in STREAMS])


def _positioned_sum(x, starts, seed):
    """Sum mod 2^32 of mix(bits ^ place) over the elements, of which x [...] is the part that begins at index `starts` of the array.
    Unsigned addition wraps exactly, so neither the order of summing nor the division into parts shows.

    mix is a bijection, so one changed element always shows. It must come after the bits have met their place: with the linear
    bits * odd(place), flips of the top bit (two signs exchanged) would cancel in every stream.
    """
    bits = _bits(x)
    starts = [*starts, 0][: bits.ndim]
    place = jnp.full((1,) * bits.ndim, seed, jnp.uint32)
    for axis, (start, size) in enumerate(zip(starts, bits.shape, strict=True)):
        # Hashed axis by axis: a flat index would overflow beyond 2^32 elements.
        along = jax.lax.broadcasted_iota(jnp.uint32, tuple(size if a == axis else 1 for a in range(bits.ndim)), axis)
        along = along + jnp.asarray(start).astype(jnp.uint32)
        place = place + _mix(along + _mix(jnp.uint32((seed + axis) % 2**32)))
    return jnp.sum(_mix(bits ^ place), dtype=jnp.uint32)


def _bits(x):
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = min(x.dtype.itemsize, 4)  # a 64-bit element becomes two words on a new last axis
    return jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]).astype(jnp.uint32)


def _mix(x):
    """MurmurHash3's 32-bit finalizer."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def named_leaves(tree) -> dict:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def json_checksum(content) -> str:
    return files.digest(content)[:16]


def saved_settings(workdir) -> dict | None:
    """The settings that the last readable checkpoint of a workdir was saved with, {} where it has none, None without a checkpoint."""
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.saved_settings()


def _best_step(checkpoints) -> int | None:
    """The step with the lowest metrics["bound"]; saves without a finite one do not take part."""
    bounds = {c.step: (c.metrics or {}).get("bound", math.nan) for c in checkpoints}
    finite = {step: bound for step, bound in bounds.items() if math.isfinite(bound)}
    return min(finite, key=finite.get) if finite else None


@dataclasses.dataclass(frozen=True)
class _Retention:
    """Orbax's preservation policy: the last few, the best, and every so many steps."""

    last: int
    every: int

    def should_preserve(self, checkpoints, *, context):
        kept = {c.step for c in checkpoints[-self.last :]} | {_best_step(checkpoints)}
        return [c.step in kept or (self.every > 0 and c.step % self.every == 0) for c in checkpoints]


class Checkpoints:
    """The checkpoints of one run. Every process of a multi-process job makes one and calls its methods alike.

    Opening it to read changes nothing on disk: evaluation can run beside training. The first save makes the folder, and clears
    away the temporary folders that a killed run left.

    Args:
      workdir: a local folder or an object-storage address.
      keep_last: this many of the latest steps are kept, and the step with the lowest metrics["bound"] as well.
      keep_every: steps that are multiples of this are kept for good; 0 keeps none.
      settings: flat JSON settings of the run, saved with every checkpoint; one that was saved with another value of any is refused.

    Raises:
      UserError: the folder is there and cannot be listed.
    """

    def __init__(self, workdir, keep_last: int = 3, keep_every: int = 0, settings: dict | None = None):
        if keep_last < 1:
            raise UserError(f"keep_last is {keep_last}: keep at least 1 checkpoint")
        path = epath.Path(workdir)
        # Orbax wants an absolute path, and resolving an address of object storage would make it a local one.
        self.directory = (path if "://" in str(path) else path.expanduser().resolve()) / "checkpoints"
        self._retention, self._settings = _Retention(keep_last, keep_every), settings
        # Bound by name: left to itself orbax would take a dictionary of numbers for a tree of arrays.
        registry = ocp.handlers.local_registry()
        for name in ("data", "run", "checksums"):
            registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
        self._context = ocp.Context()
        self._context.checkpointables.registry = registry
        self._partial = ocp.Context(self._context)
        self._partial.pytree.loading.partial_load = True
        self._writes = False
        # One process decides for all: another may be so far ahead that it has made the folder since.
        exists = multihost_utils.broadcast_one_to_all(self.directory.exists())
        self._manager = self._open(clean=False) if exists else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def save(self, step: int, state, data_state: dict, metrics: dict[str, float] | None = None) -> bool:
        """Starts saving and returns when the arrays have been copied, so that the caller may donate them. The rest is asynchronous:
        an error of it is raised by the next save, wait or close. A save still under way is waited for.

        A step that is already saved is left as it is.

        Args:
          step: the number of steps taken.
          state: pytree of jax arrays.
          data_state: the data iterator's state, JSON.
          metrics: "bound" is what the best checkpoint is chosen by.

        Returns:
          Whether a save was started: False if the step is already saved.
        """
        if not self._writes:
            self.close()
            with self._write_errors():
                self._manager, self._writes = self._open(clean=True), True
        if step in self.steps():
            return False
        run = {"step": step, "settings": self._settings}
        sums = {**checksums(state), DATA_NAME: json_checksum(data_state), RUN_NAME: json_checksum(run)}
        unit = {"state": state, "data": data_state, "run": run, "checksums": sums}
        metrics = {name: float(value) for name, value in metrics.items()} if metrics else None
        with self._write_errors():
            self._manager.save_checkpointables_async(step, unit, force=True, metrics=metrics)
        return True

    def steps(self) -> list[int]:
        """The steps saved, ascending, one still being saved included."""
        return [c.step for c in self._manager.checkpoints] if self._manager else []

    def latest(self) -> int | None:
        """The last step saved, if any."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest metrics["bound"], if any step was saved with one."""
        return _best_step(self._manager.checkpoints) if self._manager else None

    def restore(self, abstract_state, step: int | None = None):
        """Loads a checkpoint and verifies it.

        Args:
          abstract_state: the state's tree of jax.ShapeDtypeStruct, each with the sharding its array is to have.
          step: the latest if None.

        Returns:
          (step, state, data_state).

        Raises:
          UserError: no such step; another model's checkpoint (a missing or extra array, another shape or dtype); a damaged one.
        """
        step, unit = self._read(step, lambda found: self._load(found, {"state": abstract_state, "data": None}, self._context, True))
        return step, unit["state"], unit["data"]

    def restore_subtree(self, step: int | None, abstract_subtree):
        """Loads only some of the state's top-level entries, such as {"ema": ...}, verified. Arguments and errors as of `restore`.

        Returns:
          (step, the arrays in the structure of `abstract_subtree`).
        """
        step, unit = self._read(step, lambda found: self._load(found, {"state": abstract_subtree}, self._partial, False))
        return step, unit["state"]

    def saved_settings(self) -> dict | None:
        """The settings of the last checkpoint, verified; {} where it holds none or they are damaged, None without a checkpoint."""
        if self.latest() is None:
            return None
        path = self.directory / str(self.latest())
        try:
            with self._context:
                unit = ocp.load_checkpointables(path, {"run": None, "checksums": None})
                right = unit["checksums"].get(RUN_NAME) == json_checksum(unit["run"])
                return (unit["run"]["settings"] if right else None) or {}
        except Exception:  # orbax raises many kinds for a file that is missing, cut short or garbled
            return {}

    def _read(self, step, load):
        """(step, load(step)) of an existing step. Beside a run that saves and removes checkpoints, the latest may vanish while it is
        read: then the next latest is read."""
        for _ in range(READ_ATTEMPTS):
            found = self._existing(step)
            try:
                return found, load(found)
            except UserError:
                if jax.process_count() > 1 or self._writes:
                    raise
                self.close()
                self._manager = self._open(clean=False)
                if found in self.steps() and (step is not None or found == self.latest()):
                    raise
        raise UserError(f"the checkpoints in {self.directory} are replaced faster than they can be read: give the step of one that is "
                        "kept, as --step, or raise config.train.save_every of the run that writes them")

    def wait(self) -> None:
        """Returns when the save under way is committed."""
        if self._manager:
            with self._write_errors():
                self._manager.wait()

    def close(self) -> None:
        """Waits for the save under way and lets go of orbax's threads."""
        manager, self._manager, self._writes = self._manager, None, False
        if manager:
            with self._write_errors():
                manager.close()

    @contextlib.contextmanager
    def _write_errors(self):
        """What orbax and tensorstore raise for a disk that is full, read-only or gone, as one line."""
        try:
            yield
        except (UserError, jax.errors.JaxRuntimeError):  # the second is a device's failure, such as running out of memory
            raise
        except Exception as error:
            raise UserError(f"a checkpoint in {self.directory} could not be written ({_first_line(error)}): free space there, raise "
                            "ulimit -f or make it writable; the checkpoints before it are whole, and the same command resumes") from error

    def _open(self, clean: bool):
        for attempt in range(READ_ATTEMPTS):
            try:
                return ocp.training.Checkpointer(
                    self.directory, context=self._context, preservation_policy=self._retention, cleanup_tmp_directories=clean
                )
            except Exception as error:
                if clean or attempt == READ_ATTEMPTS - 1:
                    raise UserError(f"the checkpoints in {self.directory} cannot be listed ({_first_line(error)}): make the folder "
                                    "readable, and writable to train, or give another --workdir") from error
            time.sleep(0.1)  # a run beside this one may remove a step while it is listed
        return None

    def _existing(self, step):
        self.wait()
        steps = self.steps()
        if not steps:
            raise UserError(f"there is no checkpoint in {self.directory}: give the --workdir of a run that has saved one")
        if step is not None and step not in steps:
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}: it has {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def _load(self, step, abstract_unit, context, whole):
        path = self.directory / str(step)
        try:
            with context:
                stored = ocp.checkpointables_metadata(path).metadata
                if stored["state"] is None:  # orbax has logged why, and goes on
                    raise ValueError("its metadata are damaged")
                self._refuse_another_model(step, named_leaves(stored["state"]), named_leaves(abstract_unit["state"]), whole)
                also = {"checksums": None} | ({"run": None} if "run" in stored else {})  # which earlier versions did not save
                unit = ocp.load_checkpointables(path, {**abstract_unit, **also})
                saved = dict(unit["checksums"])
        except (UserError, jax.errors.JaxRuntimeError):  # the second is a device's failure, such as running out of memory
            raise
        except Exception as error:  # tensorstore and orbax raise many kinds for a file that is missing, cut short or garbled
            unit, failure = None, _first_line(error)
        if unit is None:
            gc.collect()  # of orbax's other reads, which it has abandoned
            raise self._damaged(step, f"it cannot be read ({failure})")
        found = checksums(unit["state"])
        if "data" in unit:
            found[DATA_NAME] = json_checksum(unit["data"])
        if "run" in unit or RUN_NAME in saved:
            found[RUN_NAME] = json_checksum(unit.get("run"))
        for name, value in found.items():
            if saved.get(name) != value:
                raise self._damaged(step, f"{name} has checksum {value}, saved with {saved.get(name)}")
        if "run" in unit:
            self._refuse_another_run(step, unit["run"])
        return unit

    def _refuse_another_run(self, step, run):
        if run["step"] != step:
            raise UserError(f"{self.directory / str(step)} holds the checkpoint of step {run['step']}: give the folder that number again")
        before, now = run["settings"], self._settings
        if before is None or now is None:
            return
        for key in sorted(before | now):
            if before.get(key) != now.get(key):
                raise UserError(f"checkpoint step {step} in {self.directory} was saved by a run with {_setting(before, key)}, and "
                                f"config.json has {_setting(now, key)}: put the run's own config.json and checkpoints together again")

    def _refuse_another_model(self, step, stored, expected, whole):
        if not whole:
            tops = {name.split("/")[0] for name in expected}
            stored = {name: leaf for name, leaf in stored.items() if name.split("/")[0] in tops}
        different = first_difference(stored, expected)
        if different:
            name, there, here = different
            raise UserError(f"checkpoint step {step} in {self.directory} is of another model: array {name} is {there} in the checkpoint, "
                            f"{here} in this model; use the configuration it was trained with, or another --workdir")

    def _damaged(self, step, what):
        earlier, path = [s for s in self.steps() if s < step], self.directory / str(step)
        mend = f"resume from step {earlier[-1]} by removing {path}" if earlier else (
            f"there is no earlier step: restore {path} from a copy, or start anew in another --workdir")
        return UserError(f"checkpoint step {step} is damaged: {what}; {mend}")


def _setting(settings: dict, key: str) -> str:
    return f"{key} = {settings[key]!r}" if key in settings else f"{key} at its default"


def first_difference(found: dict, expected: dict) -> tuple[str, str, str] | None:
    """(name, found, expected) of the first array that differs between two dicts of named arrays.

    Arrays are described by dtype and shape, as in "float32[3,4]", or as "absent". None if all agree.
    """
    def describe(leaf):
        return "absent" if leaf is None else f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    for name in [*expected, *sorted(set(found) - set(expected))]:
        there, here = describe(found.get(name)), describe(expected.get(name))
        if there != here:
            return name, there, here
    return None


def _quiet_orbax() -> None:
    """What orbax fails at it raises, and we say it in one line. It also logs a page in each of its threads, abandons its other reads and
    writes, and Python and tensorstore's threads report each of these."""
    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    shown, abandoned = sys.unraisablehook, ("Event loop is closed", "cannot schedule new futures after")

    def show(unraisable):
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        if not (str(unraisable.exc_value).startswith(abandoned) or (code and f"{os.sep}orbax{os.sep}" in code.co_filename)):
            shown(unraisable)

    sys.unraisablehook = show


_quiet_orbax()


def _first_line(error) -> str:
    while error.__cause__:  # the file system's own words, beneath orbax's
        error = error.__cause__
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:200]}"

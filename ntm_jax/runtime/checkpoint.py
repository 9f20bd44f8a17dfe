"""Checkpoints of a run: the train state and the data iterator's state, saved as one unit.

orbax writes them to WORKDIR/checkpoints: arrays as zarr, everything else as JSON, nothing pickled.
Each checkpoint also stores a checksum of every array, since orbax loads a flipped bit without an
error.
"""

import contextlib
import logging
import math
import os
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from ntm_jax.errors import (
    MachineFault,
    UserError,
    first_line,
    from_object_storage,
    of_storage,
)
from ntm_jax.files import is_remote
from ntm_jax.runtime import renamed
from ntm_jax.runtime.checksums import (
    array_checksums,
    first_difference,
    json_checksum,
    named_leaves,
)

# Further entries among the checksums; no array's path has angle brackets.
DATA_NAME = "<data>"  # the data iterator's state
RUN_NAME = "<run>"  # the step and the settings
BEST_KEY = "bound"  # key in files; any held-out measure: a bound, an error, or minus a reward


def locate(where) -> tuple[epath.Path, int | None]:
    """(workdir, step) of a run's folder, with step None, or of WORKDIR/checkpoints/STEP.

    A run's own folder may have a name like a checkpoint's: it has a config.json, which those lack.
    """
    folder = epath.Path(where)
    named = folder.parent.name == "checkpoints" and folder.name.isdecimal()
    named = named and not (folder / "config.json").exists()
    return (folder.parent.parent, int(folder.name)) if named else (folder, None)


def latest_step(workdir) -> int | None:
    """The step of a workdir's last checkpoint; None if there is none."""
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.latest()


class Checkpoints:
    """Saves and restores the checkpoints of one run.

    In a job of several processes, every process creates one and makes the same calls. Opening it to
    read changes nothing on disk, so evaluation can run beside training. The first save creates the
    folder, and removes the temporary folders that a killed run left.

    Args:
      workdir: a local folder or an object-storage address.
      keep_every: keeps the steps that are multiples of this, besides the latest three and the one
        with the lowest held-out measure; 0 keeps no further ones.
      settings: flat JSON settings of the run, saved with every checkpoint. Restoring refuses a
        checkpoint that was saved with other settings.
    """

    def __init__(self, workdir, keep_every: int = 0, settings: dict | None = None):
        path = epath.Path(workdir)
        # orbax needs an absolute path; resolving an object-storage address would make it local.
        path = path if is_remote(path) else path.resolve()
        self.directory = path / "checkpoints"
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(3), policies.BestN(
            get_metric_fn=lambda metrics: -metrics[BEST_KEY], n=1,
            keep_checkpoints_without_metrics=False)]
        self._kept = policies.AnyPreservationPolicy(
            kept + [policies.EveryNSteps(keep_every)] * bool(keep_every))
        self._settings = settings
        # Without these handlers orbax would take a dictionary of numbers for a tree of arrays.
        registry = ocp.handlers.local_registry()
        for name in ("data", "run", "checksums"):
            registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
        self._context = ocp.Context()
        # Replicas share the writing of large arrays; each slice of a small one is a program to
        # compile.
        self._context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
        self._context.checkpointables.registry = registry
        self._writes = False
        # One process decides for all: a faster one may already have created the folder.
        exists = multihost_utils.broadcast_one_to_all(self.directory.exists())
        self._manager = self._open(clean=False) if exists else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def save(self, step: int, state, data_state: dict, held_out: float | None = None,
             again: bool = False) -> None:
        """Starts saving a step, unless it is saved already.

        Returns once the arrays are copied, so the caller may donate them. The rest is asynchronous:
        the next save, wait or close raises its errors. Waits first for a save in progress.

        Args:
          step: the number of steps taken.
          state: pytree of jax arrays.
          data_state: the data iterator's state, JSON.
          held_out: a held-out measure, lower is better, which selects the best checkpoint.
          again: replaces a step that is saved.

        Raises UserError or MachineFault if the checkpoint, or the one before it, cannot be written
        (errors.of_storage), and UserError if another run has saved a later one in the same folder.
        """
        known = self.latest()
        with self._file_errors():
            if not self._writes:
                self.close()
                self._manager, self._writes = self._open(clean=True), True
            assert self._manager is not None
            self._manager.wait()
            if jax.process_index() == 0:  # a network disk may show the others an older list
                self._manager.reload()
        if self.latest() != known:
            raise UserError(
                f"the latest checkpoint in {self.directory} is of step {self.latest()}, and this "
                f"run's is of step {known}: another run saves there, so this one stops")
        saved = step in self.steps()
        if saved and not again:
            return
        run = {"step": step, "settings": self._settings}
        sums = {DATA_NAME: json_checksum(data_state), RUN_NAME: json_checksum(run)}
        unit = {"state": state, "data": data_state, "run": run,
                "checksums": array_checksums(state) | sums}
        metrics: Any = None  # orbax's type is that of all JSON
        if held_out is not None and math.isfinite(held_out):
            metrics = {BEST_KEY: float(held_out)}
        with self._file_errors():
            self._manager.save_checkpointables_async(
                step, unit, force=True, overwrite=saved, metrics=metrics)

    def steps(self) -> list[int]:
        """The saved steps, ascending, including one that is being saved."""
        return [c.step for c in self._manager.checkpoints] if self._manager else []

    def latest(self) -> int | None:
        """The last saved step; None if there is none."""
        return max(self.steps(), default=None)

    def saving(self) -> bool:
        """Whether a save is in progress."""
        return bool(self._manager and self._manager.is_saving_in_progress())

    def measured(self, step: int) -> bool:
        """Whether a saved step has a held-out measure."""
        return any(c.step == step and isinstance(c.metrics, dict) and BEST_KEY in c.metrics
                   for c in (self._manager.checkpoints if self._manager else ()))

    def best(self) -> int | None:
        """The saved step with the lowest held-out measure, the latest of equals; None without."""
        measures = [(c.metrics[BEST_KEY], -c.step)
                    for c in (self._manager.checkpoints if self._manager else ())
                    if isinstance(c.metrics, dict) and BEST_KEY in c.metrics]
        return -min(measures)[1] if measures else None

    def entries(self, step: int, name: str) -> tuple[str, ...]:
        """The names under a top-level entry of a saved step's state; () if it has no such entry.

        Raises UserError if the checkpoint is damaged.
        """
        with self._file_errors(step):
            paths = (path.split("/") for path in named_leaves(self._metadata(step)["state"]))
            return tuple(path[1] for path in paths if path[0] == name and len(path) > 1)

    def restore(self, abstract_state, step: int | None = None, partial: bool = False):
        """Loads and verifies a checkpoint: (step, state, data_state).

        Args:
          abstract_state: the state's tree of jax.ShapeDtypeStruct, each with the sharding that its
            array should have.
          step: the latest if None.
          partial: abstract_state has some top-level entries of the saved state alone, such as
            {"ema": ...}.

        Raises UserError if there is no such step, if it belongs to another model (an array is
        missing, extra, or of another shape or dtype) or to another run, or if it is damaged.
        """
        self.wait()
        steps = self.steps()
        if not steps:
            raise UserError(f"there is no checkpoint in {self.directory}: give the --workdir of a "
                            "run that has saved one")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}: it has "
                            f"{', '.join(map(str, steps))}")
        context = ocp.Context(self._context)
        context.pytree.loading.partial_load = partial
        context.array.loading.use_load_and_broadcast = _replicas_apart(abstract_state)
        with self._file_errors(step), context:
            stored = self._metadata(step)
            self._check_model(step, stored["state"], abstract_state, partial)
            # Earlier versions saved no settings.
            rest = {name: None for name in ("data", "checksums", "run") if name in stored}
            unit = ocp.load_checkpointables(self.directory / str(step),
                                            {"state": abstract_state} | rest)
        self._verify(step, unit)
        return step, unit["state"], unit["data"]

    def wait(self) -> None:
        """Waits until the save in progress is committed. Raises like `save` if it fails."""
        if self._manager:
            with self._file_errors():
                self._manager.wait()

    def close(self) -> None:
        """Waits for the save in progress and ends orbax's threads. Raises like `save`."""
        try:
            if self._manager:
                with self._file_errors():
                    self._manager.close()
        finally:
            self._manager, self._writes = None, False

    def _open(self, clean: bool):
        """orbax's manager of the folder; `clean` removes a killed run's temporary folders."""
        return ocp.training.Checkpointer(
            self.directory, context=self._context, preservation_policy=self._kept,  # type: ignore[arg-type]
            cleanup_tmp_directories=clean)

    @contextlib.contextmanager
    def _file_errors(self, reading: int | None = None):
        """Turns errors of orbax and tensorstore into UserError, or into MachineFault.

        reading: the step that is read, whose files may be damaged. Without it a step is written,
        and the disk may be full or read-only, or a bucket may not answer.
        """
        try:
            yield
        except (UserError, MachineFault, jax.errors.JaxRuntimeError):  # the last: a device failed
            raise
        except Exception as error:
            root = _root(error)
            if reading is not None and from_object_storage(root):
                raise of_storage(
                    root, f"checkpoint step {reading} in {self.directory} cannot be read now "
                    f"({_cause(error)}): the same command goes on once the storage answers"
                ) from error
            if reading is not None:
                raise self._damaged(reading, f"it cannot be read ({_cause(error)})") from None
            raise of_storage(
                root,
                f"a checkpoint in {self.directory} could not be written ({_cause(error)}): free "
                "space there, raise ulimit -f or make it writable; the checkpoints before it are "
                "intact, and the same command resumes") from error

    def _metadata(self, step: int) -> dict:
        """What a saved step holds, by entry."""
        folder = self.directory / str(step)
        with self._context:
            stored = ocp.checkpointables_metadata(folder).metadata
        if stored.get("state") is None:  # orbax only logs the reason
            (folder / "state" / "_METADATA").read_bytes()  # raises that of a bucket
            raise ValueError("its metadata are damaged")
        return stored

    def _check_model(self, step: int, stored, expected, partial: bool) -> None:
        """Raises UserError if a checkpoint's arrays differ from the model's in name or shape."""
        stored, expected = named_leaves(stored), named_leaves(expected)
        if partial:
            tops = {name.split("/")[0] for name in expected}
            stored = {name: leaf for name, leaf in stored.items() if name.split("/")[0] in tops}
        different = first_difference(stored, expected)
        if different:
            name, there, here = different
            raise UserError(f"checkpoint step {step} in {self.directory} is of another model: "
                            f"array {name} is {there} in the checkpoint, {here} in this model; use "
                            "the configuration it was trained with, or another --workdir")

    def _verify(self, step: int, unit: dict) -> None:
        """Raises UserError if a loaded checkpoint is damaged or was saved with other settings."""
        saved, found = unit["checksums"], array_checksums(unit["state"])
        found[DATA_NAME] = json_checksum(unit["data"])
        if RUN_NAME in saved:  # earlier versions did not save it
            found[RUN_NAME] = json_checksum(unit.get("run"))
        for name, value in found.items():
            if saved.get(name) != value:
                raise self._damaged(
                    step, f"{name} has checksum {value}, saved with {saved.get(name)}")
        before = renamed.current(unit.get("run", {}).get("settings") or {})
        now = self._settings or {}
        for key in sorted(before.keys() & now):  # earlier versions left out those at defaults
            if before[key] != now[key]:
                raise UserError(
                    f"checkpoint step {step} in {self.directory} was saved by a run with {key} = "
                    f"{before[key]!r}, and this one has {now[key]!r}: give that value to "
                    "resume, or put the run's own config.json and checkpoints together again")

    def _damaged(self, step, reason: str) -> UserError:
        earlier, path = [s for s in self.steps() if s < step], self.directory / str(step)
        remedy = (f"resume from step {earlier[-1]} by removing {path}" if earlier else
                  f"there is no earlier step: restore {path} from a copy, or start anew in another "
                  "--workdir")
        return UserError(f"checkpoint step {step} is damaged: {reason}; {remedy}")


def _replicas_apart(tree) -> bool:
    """Whether other processes hold copies of all that the processes of the first replica hold.

    A replica is a place on the mesh's first axis. The first one then reads for all.
    """
    shardings = {leaf.sharding for leaf in jax.tree.leaves(tree)}
    if not all(isinstance(one, NamedSharding) for one in shardings):
        return False
    mesh = next(iter(shardings)).mesh
    if any(mesh.axis_names[0] in jax.tree.leaves(tuple(one.spec)) for one in shardings):
        return False
    first, *others = ({device.process_index for device in replica}
                      for replica in mesh.devices.reshape(len(mesh.devices), -1))
    return bool(others) and first.isdisjoint(set().union(*others))


def _root(error: BaseException) -> Any:
    """The root cause of orbax's error, often the file system's."""
    while error.__cause__:
        error = error.__cause__
    return error


def _cause(error: BaseException) -> str:
    """The root cause with its type, in one line."""
    root = _root(error)
    return f"{type(root).__name__}: {first_line(root)}"


# orbax and its event loop log a page about each failure that they also raise.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
logging.getLogger("asyncio").addFilter(
    lambda record: "exception was never retrieved" not in record.getMessage())

"""A folder that a program writes batch by batch, so that a stopped call can be resumed."""

import io
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ntm_jax import files
from ntm_jax.errors import UserError
from ntm_jax.progress import track
from ntm_jax.runtime import checksums
from ntm_jax.runtime.processes import require_same_everywhere
from ntm_jax.runtime.run import Run
from ntm_jax.sampling.generate import in_batches


def fill(run: Run, folder: epath.Path, call: str, last: str, asked: dict, num: int, batch: int,
         make: Callable[[np.ndarray], dict], gather: Callable[[dict], None]) -> None:
    """Makes what a folder lacks of items 0..num-1 of a run, `batch` at a time.

    call: the file that records what was asked for, of which only the same resumes the folder.
    last: the file that is written last. asked: the call, by flag. make(index): writes the files of
    these items, and returns arrays [n, ...] by name. gather(arrays): writes the files of all items,
    `last` at the end, from the arrays of all batches.

    Raises UserError where the folder holds anything else.
    """
    asked = {"--workdir": run.workdir, "step": run.step, "--num": num, "--batch": batch} | asked
    # No process has written yet: one that arrived late would find its own job's files.
    require_same_everywhere({"--out": str(folder)} | asked)
    params = run.params, run.denoiser and run.denoiser.params
    asked["checksum"] = checksums.digest(params)
    _check_resumable(folder, call, asked)
    finished, batches = (folder / last).exists(), in_batches(num, batch)
    parts = [folder / f"part-{number:06d}.npz" for number in range(len(batches))]
    done = np.array([finished or part.exists() for part in parts])
    # Process 0 decides: a folder may appear late on another host.
    done = multihost_utils.broadcast_one_to_all(done)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(folder / call, asked)
    for number, index in enumerate(track(batches, epath.Path(call).stem, "batches")):
        if done[number]:
            continue
        arrays = make(index)
        if jax.process_index() == 0:
            # Written last and atomically: its presence marks the batch as complete.
            with files.atomic_writer(parts[number]) as file:
                np.savez(file, **arrays)
    if jax.process_index() == 0 and not finished:
        found = [dict(np.load(io.BytesIO(part.read_bytes()), allow_pickle=False))
                 for part in parts]
        gather({name: np.concatenate([part[name] for part in found]) for name in found[0]})
        for part in parts:
            part.unlink()


def _check_resumable(folder: epath.Path, call: str, asked: dict) -> None:
    """Raises UserError where a folder holds anything that was not asked for."""
    held = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not held - {call}:  # at most a call that ended before it made anything
        return
    if call not in held:
        raise UserError(f"{folder} exists and is not empty: choose a new --out (nothing was "
                        "overwritten)")
    before = files.read_json(folder / call, "give another --out")
    for key in sorted(before | asked):
        if before.get(key) != files.to_json(asked.get(key)):
            raise UserError(f"{folder} holds samples of {key} {before.get(key)!r}, and "
                            f"this call has {asked.get(key)!r}: give another --out, or the "
                            "same settings to go on; nothing was overwritten")

"""Weights & Biases: the extra [wandb], opened by --writer=wandb:PROJECT.

WORKDIR/wandb.json keeps the run's id there, so that a resumed run continues it. WANDB_MODE=offline
writes into WORKDIR/wandb, for `wandb sync`; WANDB_ENTITY and its other variables apply.
"""

import os
import sys
import uuid

from etils import epath

from ntm_jax import files
from ntm_jax.data import pretrained
from ntm_jax.errors import UserError, first_line


class WandB:
    """Sends a run's metrics, pictures and settings to a project of Weights & Biases.

    Raises UserError where wandb is not installed.
    """

    def __init__(self, project: str = ""):
        self._wandb = pretrained.module("wandb", "wandb (the extra [wandb])")
        self._project = project or "ntm_jax"

    def open(self, workdir: str, start_step: int, settings: dict) -> None:
        """Begins a run, or continues the one in WORKDIR/wandb.json where training resumes.

        Raises UserError where W&B cannot be reached or nobody is logged in.
        """
        path = epath.Path(workdir) / "wandb.json"
        identity = uuid.uuid4().hex[:12]
        if start_step and path.exists():
            identity = files.parse_object(files.read(path))["id"]
        local = None if files.is_remote(workdir) else workdir
        try:
            self._run = self._wandb.init(
                project=self._project, id=identity, name=path.parent.name, config=settings,
                resume="allow", dir=local, settings=self._wandb.Settings(console="off"))
        except self._wandb.Error as error:
            raise UserError(f"--writer=wandb:{self._project} cannot begin "
                            f"({first_line(error)}): log in with `wandb login`, or set "
                            "WANDB_MODE=offline") from None
        files.write_json(path, {"id": identity})

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Sends a step's scalars; those of steps that W&B has already are left out."""
        self._log(step, scalars)

    def picture(self, step: int, path) -> None:
        """Sends a picture under its file's name."""
        if not files.is_remote(path):  # W&B reads local files only
            self._log(step, {path.stem: self._wandb.Image(os.fspath(path))})

    def close(self) -> None:
        """Sends what is left, and marks the run as failed where an exception ends it."""
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))

    def _log(self, step: int, values: dict) -> None:
        if step >= self._run.starting_step:
            self._run.log(values, step=step)

"""The folders that GenEval and DPG-Bench evaluate, for launch.sample --layout.

GenEval (Ghosh et al. 2023, arXiv 2310.11513; evaluation/evaluate_images.py of djghosh13/geneval)
reads metadata.jsonl and samples/NUMBER.png in folders that are named by numbers, and ignores all
else. DPG-Bench (Hu et al. 2024, arXiv 2403.05135; dpg_bench/compute_dpg_bench.py of
TencentQQGYLab/ELLA) takes every file of a folder for the four images of one prompt, in two rows
without a gap, and cuts it at multiples of --resolution; the file's name names the prompt.
"""

from collections.abc import Sequence

import numpy as np

from ntm_jax import files
from ntm_jax.errors import UserError
from ntm_jax.runtime import plots
from ntm_jax.sampling.prompts import Layout, Prompt


class GenEval(Layout):
    """OUT/00000 and so on, each with metadata.jsonl, samples/0000.png and so on, and grid.png."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError for a prompt without a line of metadata."""
        lacking = [prompt.text for prompt in prompts if not prompt.line]
        if lacking:
            raise UserError("--layout=geneval copies the metadata of every prompt, and "
                            f"{len(lacking)} of {len(prompts)} prompts have none, such as "
                            f"{lacking[0]!r}: give GenEval's own prompts/evaluation_metadata.jsonl "
                            "as --prompts")

    def image(self, number: int, per_prompt: int, count: int) -> str:
        """The file of image `number` of `count`, relative to the folder."""
        return f"{number // per_prompt:05d}/samples/{number % per_prompt:04d}.png"

    def describe(self, folder, number: int, prompt: Prompt, images: np.ndarray) -> None:
        """Writes the metadata and the grid of a prompt's images."""
        inner = folder / f"{number:05d}"
        files.write(inner / "metadata.jsonl", prompt.line)
        plots.save_png(inner / "grid.png", plots.image_grid(images, len(images)))


class DPG(Layout):
    """OUT/dpg/NAME.png with the images of the prompt in the file NAME.txt."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError for prompts that are not from files of their own."""
        if not all(prompt.name for prompt in prompts):
            raise UserError("--layout=dpg names a picture after the file of its prompt: give "
                            "DPG-Bench's folder of .txt files as --prompts")

    def describe(self, folder, number: int, prompt: Prompt, images: np.ndarray) -> None:
        """Writes the picture of a prompt's images."""
        (folder / "dpg").mkdir(exist_ok=True)
        picture = plots.image_grid(images, min(2, len(images)), padding=0)
        plots.save_png(folder / "dpg" / f"{prompt.name}.png", picture)

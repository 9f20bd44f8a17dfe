"""Prompts of a text-conditioned model: reading, encoding, and the folders that benchmarks evaluate.

GenEval (Ghosh et al. 2023, arXiv 2310.11513; evaluation/evaluate_images.py of djghosh13/geneval)
reads metadata.jsonl and samples/NUMBER.png in folders that are named by numbers, and ignores all
else. DPG-Bench (Hu et al. 2024, arXiv 2403.05135; dpg_bench/compute_dpg_bench.py of
TencentQQGYLab/ELLA) takes every file of a folder for the four images of one prompt, in two rows
without a gap, and cuts it at multiples of --resolution; the file's name names the prompt.

Symbols: P prompts; n images of each; M text tokens, E their width; H, W, C image height, width,
channels.
"""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from ntm_jax import files
from ntm_jax.core.conditions import Text
from ntm_jax.data import text
from ntm_jax.data.text import pad_text
from ntm_jax.errors import UserError
from ntm_jax.runtime import plots
from ntm_jax.runtime.run import Run


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt with the metadata of the file that it was read from."""

    text: str
    line: str = ""  # its line of a .jsonl file
    name: str = ""  # the name of its own .txt file, without the suffix


def parse(given: Sequence[str]) -> list[Prompt]:
    """The prompts of the flag --prompts.

    given: prompts, and files and folders of them: a .jsonl file with a "prompt" in every line, a
    text file with one prompt a line, or a folder of .txt files with one prompt each. Raises
    UserError for a file that is missing, malformed or empty.
    """
    return [prompt for value in given for prompt in _parse_value(value)]


def _parse_value(value: str) -> list[Prompt]:
    path = epath.Path(value).expanduser()
    try:
        is_file, is_folder = path.is_file(), value and path.is_dir()
    except OSError:  # too long for a file's name
        is_file = is_folder = False
    if is_folder:
        paths = sorted(file for file in path.iterdir() if file.suffix == ".txt" and file.is_file())
        found = [Prompt(file.read_text().strip(), name=file.stem) for file in paths]
    elif is_file:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        found = [_from_json(line, path) if path.suffix == ".jsonl" else Prompt(line)
                 for line in lines]
    elif value.endswith((".txt", ".jsonl")):
        raise UserError(f"--prompts={value} does not exist: expected a file of prompts, a folder "
                        "of .txt files, or a prompt itself")
    else:
        return [Prompt(value)]
    if not found:
        raise UserError(f"--prompts={value} holds no prompts: expected a file with one a line, or "
                        "a folder of .txt files with one each")
    return found


def _from_json(line: str, path) -> Prompt:
    try:
        return Prompt(str(files.parse_object(line)["prompt"]), line)
    except (ValueError, KeyError):
        raise UserError(f"--prompts={path} has the line {line[:60]!r}: expected JSON with a "
                        "\"prompt\"") from None


def open_encoder(run: Run, name: str | None = None):
    """The text encoder of a run's prompts: the run's own, or the one called `name`.

    Raises UserError where the model is not conditioned on text, where neither the run nor `name`
    names an encoder, or where its states do not fit the model.
    """
    width = run.condition.width
    if not run.condition.captioned:
        raise UserError(f"prompts are given, and the model of {run.workdir} "
                        f"is conditioned on {run.condition.describe()}: leave them out")
    name = name or run.spec.text
    if not name:
        raise UserError("prompts are given, and the training records of "
                        f"{run.workdir} do not name the encoder of their text states: name it with "
                        "--encoder, such as minilm or flux2:FOLDER")
    found = text.open_encoder(name)
    if found.width != width:
        raise UserError(f"the text encoder {name!r} makes states of width {found.width}, and the "
                        f"model of {run.workdir} was trained on {run.spec.text or 'states'} of "
                        f"width {width}: give the encoder of its records")
    return found


def states(encoder, prompts: Sequence[str]) -> Text:
    """The states [P, M, E] of prompts and their mask [P, M].

    Warns where prompts are too long for the encoder and were cut.
    """
    distinct = list(dict.fromkeys(prompts))
    found, cut = text.encode(encoder, distinct)
    text.warn_of_cut(encoder, distinct, cut)
    padded = {prompt: pad_text(own, encoder.tokens)
              for prompt, own in zip(distinct, found, strict=True)}
    return Text(*(np.stack([padded[prompt][key] for prompt in prompts])
                  for key in ("text", "text_mask")))


def check_layout(layout: str | None, prompts: Sequence[Prompt] | None) -> None:
    """Raises UserError where prompts do not fit the benchmark `layout`."""
    if not layout:
        return
    if not prompts:
        raise UserError(f"--layout={layout} writes a benchmark's folder: give its prompts as "
                        "--prompts")
    if layout == "geneval":
        lacking = [prompt.text for prompt in prompts if not prompt.line]
        if lacking:
            raise UserError("--layout=geneval copies the metadata of every prompt, and "
                            f"{len(lacking)} of {len(prompts)} prompts have none, such as "
                            f"{lacking[0]!r}: give GenEval's own prompts/evaluation_metadata.jsonl "
                            "as --prompts")
    if layout == "dpg":
        names = [prompt.name for prompt in prompts]
        if not all(names) or len(set(names)) < len(names):
            raise UserError("--layout=dpg names a picture after the file of its prompt: give "
                            "DPG-Bench's folder of .txt files as --prompts")


def image_path(folder, layout: str | None, number: int, per_prompt: int, count: int):
    """The path of the PNG file of image `number` of `count`; makes its folder."""
    if layout == "geneval":
        inner = folder / f"{number // per_prompt:05d}" / "samples"
        inner.mkdir(parents=True, exist_ok=True)
        return inner / f"{number % per_prompt:04d}.png"
    return folder / f"{number:0{len(str(count - 1))}d}.png"


def write_pictures(folder, layout: str | None, prompts: Sequence[Prompt],
                   shown: np.ndarray) -> None:
    """Writes the files that describe the images of prompts, beside the images themselves.

    shown: the images [P n, H, W, C] uint8, n of each prompt in turn. The files are
    contact_sheet.png with a row for each prompt, prompts.jsonl with a line for each image, and what
    the benchmark `layout` needs for each prompt: GenEval metadata.jsonl and grid.png, DPG-Bench
    FOLDER/dpg/NAME.png.
    """
    groups = np.split(shown, len(prompts))
    per_prompt = len(groups[0])
    for number, (prompt, images) in enumerate(zip(prompts, groups, strict=True)):
        if layout == "geneval":
            inner = folder / f"{number:05d}"
            files.write(inner / "metadata.jsonl", prompt.line)
            plots.save_png(inner / "grid.png", plots.image_grid(images, per_prompt))
        if layout == "dpg":
            (folder / "dpg").mkdir(exist_ok=True)
            picture = plots.image_grid(images, min(2, per_prompt), padding=0)
            plots.save_png(folder / "dpg" / f"{prompt.name}.png", picture)
    lines = []
    for i in range(len(shown)):
        path = image_path(folder, layout, i, per_prompt, len(shown))
        lines.append({"file_name": str(path.relative_to(folder)),
                      "prompt": prompts[i // per_prompt].text})
    files.write(folder / "prompts.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    rows = [plots.SheetRow(prompt.text, images[:10])
            for prompt, images in zip(prompts[:50], groups, strict=False)]
    plots.contact_sheet(rows, folder / "contact_sheet.png")

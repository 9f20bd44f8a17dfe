"""What a model of texts is asked to show: prompts, their states, and the folders of images that text-to-image benchmarks evaluate.

P prompts, M text tokens, E their width; H, W, C image height, width, channels.
"""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from etils import epath

from ntm_jax import files
from ntm_jax.core.layers import Text
from ntm_jax.data import text
from ntm_jax.data.records import pad_text
from ntm_jax.errors import UserError
from ntm_jax.runtime import plots


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and of one that was read from files its line of .jsonl, or the name of its own .txt file without the ending."""

    text: str
    line: str = ""
    name: str = ""


def parse(given: Sequence[str]) -> list[Prompt]:
    """The flag --prompts, each a prompt, or a file of them: .jsonl with a "prompt" in every line, a text file with one prompt a line, or
    a folder of .txt files with one each. UserError for a file that is not there or not understood, or holds no prompts."""
    prompts = []
    for value in given:
        path = epath.Path(value).expanduser()
        try:
            is_file, is_folder = path.is_file(), value and path.is_dir()
        except OSError:  # too long for a file's name
            is_file = is_folder = False
        found = [Prompt(value)]
        if is_folder:
            paths = sorted(file for file in path.iterdir() if file.suffix == ".txt" and file.is_file())
            found = [Prompt(_text(file).strip(), name=file.stem) for file in paths]
        elif is_file:
            lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
            found = [_from_json(line, path) if path.suffix == ".jsonl" else Prompt(line) for line in lines]
        elif value.endswith((".txt", ".jsonl")):
            raise UserError(f"--prompts={value} is not there: expected a file of prompts, a folder of .txt files, or a prompt itself")
        if not found:
            raise UserError(f"--prompts={value} holds no prompts: expected a file with one a line, or a folder of .txt files with one each")
        prompts += found
    return prompts


def _text(path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        raise UserError(f"--prompts={path} is not UTF-8: save it as UTF-8 text") from None


def _from_json(line: str, path) -> Prompt:
    try:
        return Prompt(str(files.parse_json(line)["prompt"]), line)
    except (ValueError, KeyError):
        raise UserError(f"--prompts={path} has the line {line[:60]!r}: expected JSON with a \"prompt\"") from None


def open_encoder(run, name: str | None = None):
    """The encoder of a run's prompts, or the one of another name. UserError where the run's is not known, or the name's is another one."""
    if not run.model.config.text_width:
        told = f"one of {run.model.config.num_classes} classes" if run.model.config.num_classes else "nothing"
        raise UserError(f"prompts are given, and the model of {run.workdir} is told {told}: leave them out")
    name = name or run.spec.text
    if not name:
        raise UserError(f"prompts are given, and the records that {run.workdir} was trained on do not tell what encoder made their text "
                        "states: name it with --encoder, such as minilm or flux2:FOLDER")
    found = text.open_encoder(name)
    if found.width != run.model.config.text_width:
        raise UserError(f"the text encoder {name!r} makes states of width {found.width}, and the model of {run.workdir} was trained on "
                        f"{run.spec.text or 'states'} of width {run.model.config.text_width}: give the encoder of its records")
    return found


def states(encoder, prompts: Sequence[str]) -> Text:
    """Prompts -> their states [P, M, E] and mask [P, M]; a warning where any is too long for the encoder and cut."""
    distinct = list(dict.fromkeys(prompts))
    found, cut = encoder.encode(distinct)
    text.warn_of_cut(encoder, distinct, cut)
    padded = {prompt: pad_text(own, encoder.tokens) for prompt, own in zip(distinct, found, strict=True)}
    return Text(*(np.stack([padded[prompt][key] for prompt in prompts]) for key in ("text", "text_mask")))


# Benchmarks' folders. GenEval (Ghosh et al. 2023, arXiv 2310.11513), evaluation/evaluate_images.py of djghosh13/geneval, reads in folders
# whose names are numbers metadata.jsonl and samples/NUMBER.png, and passes over everything else. DPG-Bench (Hu et al. 2024, arXiv
# 2403.05135), dpg_bench/compute_dpg_bench.py of TencentQQGYLab/ELLA, takes every file of a folder for a prompt's four images in two rows,
# without a gap, cut at multiples of --resolution, and its name for the prompt's.


def check_layout(layout: str | None, prompts: Sequence[Prompt] | None, per_prompt: int, image_shape) -> None:
    """UserError where prompts or images are not what a benchmark's evaluator needs."""
    if layout and not prompts:
        raise UserError(f"--layout={layout} is a folder of a benchmark's prompts: give them as --prompts")
    if layout == "geneval":
        lacking = [p.text for p in prompts if not p.line or not {"tag", "prompt"} <= files.parse_json(p.line).keys()]
        if lacking:
            raise UserError(f"--layout=geneval copies a prompt's metadata, and {len(lacking)} of {len(prompts)} prompts have none, such "
                            f"as {lacking[0]!r}: give GenEval's own prompts/evaluation_metadata.jsonl as --prompts")
    if layout == "dpg":
        names = [p.name for p in prompts]
        if not all(names) or len(set(names)) < len(names):
            raise UserError("--layout=dpg names a picture by its prompt's file: give DPG-Bench's folder of .txt files as --prompts")
        if per_prompt > 4 or image_shape[0] != image_shape[1]:
            raise UserError(f"--layout=dpg lays four squares in a picture, and there are {per_prompt} images of {image_shape[1]} x "
                            f"{image_shape[0]}: give --per_prompt=4 of a model of square images")


def place(folder, layout: str | None, number: int, per_prompt: int, count: int):
    """Where image `number` of `count` lies: the path of its PNG file."""
    if layout == "geneval":
        inner = folder / f"{number // per_prompt:05d}" / "samples"
        inner.mkdir(parents=True, exist_ok=True)
        return inner / f"{number % per_prompt:04d}.png"
    return folder / f"{number:0{len(str(count - 1))}d}.png"


def write_pictures(folder, layout: str | None, prompts: Sequence[Prompt], shown: np.ndarray) -> None:
    """Beside the images [P n, H, W, C] uint8 themselves, n of each prompt in turn: contact_sheet.png, prompts.jsonl, a line an image, and
    what a benchmark wants of a prompt: GenEval its metadata and grid, DPG-Bench folder/dpg/NAME.png."""
    groups = np.split(shown, len(prompts))
    per_prompt = len(groups[0])
    for number, (prompt, images) in enumerate(zip(prompts, groups, strict=True)):
        if layout == "geneval":
            inner = folder / f"{number:05d}"
            files.write(inner / "metadata.jsonl", prompt.line)
            plots.save_png(inner / "grid.png", plots.image_grid(images, per_prompt))
        if layout == "dpg":
            (folder / "dpg").mkdir(exist_ok=True)
            plots.save_png(folder / "dpg" / f"{prompt.name}.png", plots.image_grid(images, min(2, per_prompt), padding=0))
    lines = [{"file_name": str(place(folder, layout, i, per_prompt, len(shown)).relative_to(folder)), "prompt": p.text}
             for i, p in enumerate(p for p in prompts for _ in range(per_prompt))]
    files.write(folder / "prompts.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    plots.contact_sheet(shown[:200], [line["prompt"] for line in lines[:200]], folder / "contact_sheet.png")

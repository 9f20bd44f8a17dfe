"""Prompts of a text-conditioned model: reading, encoding, and the files of their images.

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

# Folders that benchmarks evaluate, by --layout; see Layout.
LAYOUTS = {"geneval": "ntm_jax.projects.scenes.layouts:GenEval",
           "dpg": "ntm_jax.projects.scenes.layouts:DPG"}


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
        found = [Prompt(files.read(file).decode().strip(), name=file.stem) for file in paths]
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
    found, cut = encoder.encode(distinct)
    text.warn_of_cut(encoder, distinct, cut)
    padded = {prompt: pad_text(own, encoder.tokens)
              for prompt, own in zip(distinct, found, strict=True)}
    return Text(*(np.stack([padded[prompt][key] for prompt in prompts])
                  for key in ("text", "text_mask")))


class Layout:
    """Where the images of prompts go in a folder, and what else it holds of each prompt."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError where prompts lack what the folder needs of them."""

    def image(self, number: int, per_prompt: int, count: int) -> str:
        """The file of image `number` of `count`, relative to the folder."""
        return f"{number:0{len(str(count - 1))}d}.png"

    def describe(self, folder, number: int, prompt: Prompt, images: np.ndarray) -> None:
        """Writes what else the folder holds of prompt `number` and its images [n, H, W, C]."""


def write_pictures(folder, layout: Layout, prompts: Sequence[Prompt], shown: np.ndarray) -> None:
    """Writes the files that describe the images of prompts, beside the images themselves.

    shown: the images [P n, H, W, C] uint8, n of each prompt in turn. The files are
    contact_sheet.png with a row for each prompt, prompts.jsonl with a line for each image, and
    those of the layout.
    """
    groups = np.split(shown, len(prompts))
    for number, (prompt, images) in enumerate(zip(prompts, groups, strict=True)):
        layout.describe(folder, number, prompt, images)
    per_prompt = len(groups[0])
    lines = [{"file_name": layout.image(i, per_prompt, len(shown)),
              "prompt": prompts[i // per_prompt].text} for i in range(len(shown))]
    files.write(folder / "prompts.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    rows = [plots.SheetRow(prompt.text, images[:10])
            for prompt, images in zip(prompts[:50], groups, strict=False)]
    plots.contact_sheet(rows, folder / "contact_sheet.png")

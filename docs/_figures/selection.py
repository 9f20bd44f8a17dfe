"""Draws samples of captions beside those that the likelihood selects among more candidates.

    python docs/_figures/selection.py RUN OUT

RUN is a run of captioned shapes, OUT a PNG file.
"""

import sys

from ntm_jax import api
from ntm_jax.runtime import plots

CAPTIONS = (  # the last two describe combinations that no training image shows
    "a triangle and a cross", "three triangles", "a triangle left of a square",
    "a white triangle and a red square", "four squares", "a green circle and a red square",
    "three squares", "a yellow cross")
EACH, CANDIDATES = 8, 4


def main(workdir: str, out: str):
    run = api.load(workdir)
    asked = [caption for caption in CAPTIONS for _ in range(EACH)]
    sets = [run.best_of(count).sample(len(asked), prompts=asked, guidance=0.0)
            for count in (1, CANDIDATES)]
    rows = [plots.SheetRow(caption, *(images[i * EACH : (i + 1) * EACH] for images in sets))
            for i, caption in enumerate(CAPTIONS)]
    plots.contact_sheet(rows, out, ("one candidate", f"selected of {CANDIDATES}"))


if __name__ == "__main__":
    main(*sys.argv[1:])

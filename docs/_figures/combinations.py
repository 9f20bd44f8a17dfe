"""Draws samples of two runs, one before and one after post-training, for new combinations.

    python docs/_figures/combinations.py BEFORE AFTER OUT

BEFORE and AFTER are runs of captioned shapes, OUT a PNG file.
"""

import sys

from ntm_jax import api
from ntm_jax.runtime import plots

CAPTIONS = (  # each describes a combination that no training image shows
    "a red circle", "a purple circle", "a yellow cross", "three squares",
    "a cross left of a circle", "a white square and a red triangle",
    "a blue triangle and a green square", "a purple circle and a yellow triangle")
EACH = 8


def main(before: str, after: str, out: str):
    asked = [caption for caption in CAPTIONS for _ in range(EACH)]
    sets = [api.load(workdir).sample(len(asked), prompts=asked, guidance=1.0)
            for workdir in (before, after)]
    rows = [plots.SheetRow(caption, *(images[i * EACH : (i + 1) * EACH] for images in sets))
            for i, caption in enumerate(CAPTIONS)]
    plots.contact_sheet(rows, out, ("before", "after"))


if __name__ == "__main__":
    main(*sys.argv[1:])

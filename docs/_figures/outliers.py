"""Prints how well scores of a run of digits tell held-out digits from other images.

    python docs/_figures/outliers.py RUN [OUT]

RUN is a folder of --config=digits; OUT is a PNG file for a picture of the images. The tables have
the figures of docs/results/outliers.md and more: AUROC, the probability that an image of another
kind has a higher score than a held-out digit, with its bootstrap standard error. Symbols: n images
a set, T steps.
"""

import io
import itertools
import pathlib
import sys

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.special import logsumexp, softmax
from sklearn.datasets import load_sample_image
from style import SKY, chart, look, save

import ntm_jax

TRAJECTORIES, RESAMPLES, WHITE = 4, 1000, 16
PARTS = 2  # of the training images, each as many as the held-out ones, that give training means
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnpqrstuvwxyz"  # without those that look like 0 and 1
FONTS = [f"DejaVu{name}.ttf" for name in (
    *(f"Sans{kind}{style}" for kind in ("", "Mono")
      for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"Serif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")))]
ALTERED = ("rotated by 90°", "rotated by 180°", "inverted", "shuffled pixels",
           "half as bright")
OTHER = ("letters", "constant", "near constant", "photograph")


def letter(character: str, font: str) -> np.ndarray:
    """A letter as the digits were made: a bitmap of 32 x 32, counted in blocks of 4 x 4, [8, 8]."""
    path = pathlib.Path(matplotlib.get_data_path()) / "fonts/ttf" / font
    drawn = Image.new("L", (200, 200))
    ImageDraw.Draw(drawn).text((40, 20), character, 255, ImageFont.truetype(str(path), 100))
    drawn = drawn.crop(drawn.getbbox())
    scale = 32 / max(drawn.size)
    drawn = drawn.resize([max(round(side * scale), 1) for side in drawn.size])
    bitmap = Image.new("L", (32, 32))
    bitmap.paste(drawn, [(32 - side) // 2 for side in drawn.size])
    return (np.asarray(bitmap) > 127).reshape(8, 4, 8, 4).sum((1, 3))


def other_images(digits: np.ndarray) -> dict[str, np.ndarray]:
    """{name: images [n, 8, 8, 1]} of the sets; the altered ones are of these digits, in order."""
    n, rng = len(digits), np.random.default_rng(0)
    pairs = np.array(list(itertools.product(LETTERS, FONTS)))
    photo = load_sample_image("china.jpg")[:424, :640].mean(-1)
    photo = photo.reshape(106, 4, 160, 4).mean((1, 3)) * (WHITE / 255)  # a pixel is 4 x 4 pixels
    corners = rng.integers(0, (98, 152), (n, 2))
    level = rng.integers(0, WHITE + 1, (n, 1, 1))
    noisy = (level.clip(1, WHITE - 1) + rng.integers(-1, 2, (n, 8, 8)))
    arrays = (
        np.rot90(digits, axes=(1, 2)), np.rot90(digits, 2, axes=(1, 2)), WHITE - digits,
        digits.reshape(n, 64)[:, rng.permutation(64)], digits // 2,
        [letter(*pair) for pair in rng.permutation(pairs)[:n]], np.tile(level, (1, 8, 8)), noisy,
        [photo[r : r + 8, c : c + 8].round() for r, c in corners])
    return {name: np.asarray(images).reshape(n, 8, 8, 1).astype(np.uint8)
            for name, images in zip(ALTERED + OTHER, arrays, strict=True)}


def likelihoods(run, images, seed: int) -> dict[str, np.ndarray]:
    """log_prob [n], nll and rate [n, T] in nats, of the mean over the classes."""
    found = [run.log_prob_by_level(images, label, TRAJECTORIES, seed)
             for label in range(run.spec.num_classes)]
    joint = np.stack([one.log_prob for one in found]) - np.log(len(found))
    weights = softmax(joint, 0)[..., None]
    return {"log_prob": logsumexp(joint, 0),
            "nll": (weights * np.stack([one.nll for one in found])).sum(0),
            "rate": (weights * np.stack([one.rate for one in found])).sum(0)}


def simple(images, train) -> dict[str, np.ndarray]:
    """Measures of images that need no model, [n] each; train: the training images."""
    def png(image):
        file = io.BytesIO()
        Image.fromarray(image[..., 0] * 15).save(file, "png", optimize=True)
        return file.tell()

    pixels = images[..., 0].astype(float)
    apart = (pixels.reshape(-1, 1, 64) - train.reshape(1, -1, 64)) ** 2
    variation = sum(np.abs(np.diff(pixels, axis=axis)).sum((1, 2)) for axis in (1, 2))
    return {"PNG": np.array([png(image) for image in images]), "variation": variation,
            "brightness": pixels.mean((1, 2)), "nearest": apart.sum(-1).min(1)}


def distance(values, reference):
    """Mahalanobis distance of values [n] or [n, F] from the mean of reference [m, ...], [n]."""
    values, reference = (np.asarray(a, float).reshape(len(a), -1) for a in (values, reference))
    whiten = np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(reference.T))))
    return np.linalg.norm((values - reference.mean(0)) @ whiten.T, axis=1)


def across(values, held_out):
    """Distance from the other half of the held-out digits: of even from odd, of odd from even."""
    found = np.empty(len(values))
    for half in (0, 1):
        found[half::2] = distance(values[half::2], held_out[1 - half :: 2])
    return found


def scores(found: dict, train: dict, held_out: dict) -> tuple[dict, dict]:
    """({score: [n]}, {score by level: [n]}) of a set; high values are to mean another kind."""
    steps = range(found["nll"].shape[1])
    typical = "from the training mean"
    whole = {
        "-log p(x)": -found["log_prob"],
        f"log p(x), {typical}": distance(found["log_prob"], train["log_prob"]),
        "log p(x), from the held-out mean": across(found["log_prob"], held_out["log_prob"]),
        f"all NLLs, {typical}": distance(found["nll"], train["nll"]),
        "all NLLs, from the held-out mean": across(found["nll"], held_out["nll"]),
        "all rates, from the held-out mean": across(found["rate"], held_out["rate"]),
        f"PNG size, {typical}": distance(found["PNG"], train["PNG"]),
        f"total variation, {typical}": distance(found["variation"], train["variation"]),
        f"mean brightness, {typical}": distance(found["brightness"], train["brightness"]),
        "distance to the nearest training image": found["nearest"]}
    by_level = {f"NLL of step {k}": found["nll"][:, k] for k in steps}
    by_level |= {f"rate of step {k}": found["rate"][:, k] for k in steps}
    by_level |= {f"NLL of step {k}, from the held-out mean": across(
        found["nll"][:, k], held_out["nll"][:, k]) for k in steps}
    return whole, by_level


def auroc(inside, outside, paired: bool) -> tuple[float, float]:
    """(AUROC, bootstrap standard error) of scores [n] of digits and of another set, ties half.

    paired: image i of the other set is made of digit i, and both are resampled together.
    """
    above = (outside > inside[:, None]) + 0.5 * (outside == inside[:, None])
    rng, n = np.random.default_rng(0), len(inside)
    first, second = rng.multinomial(n, np.full(n, 1 / n), (2, RESAMPLES))
    resampled = np.sum((first @ above) * (first if paired else second), 1) / n**2
    return above.mean(), resampled.std(ddof=1)


def print_table(table: dict, names):
    """Prints AUROC of {set: {score: [n]}} for these sets as a table, a row for each score."""
    inside = table["held-out digits"]
    print(f"\n| score | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for score, values in inside.items():
        cells = ("{:.3f} ± {:.3f}".format(*auroc(values, table[name][score], name in ALTERED))
                 for name in names)
        print(f"| {score} | {' | '.join(cells)} |")


def picture(sets: dict, path, columns: int = 20):
    """Draws the first images of each set in a row."""
    with look():
        figure, axes = chart(0.4 * len(sets), len(sets), 1)
        for (name, images), (axis,) in zip(sets.items(), axes, strict=True):
            row = np.pad(images[:columns, ..., 0].astype(float), ((0, 0), (1, 1), (1, 1)),
                         constant_values=np.nan)
            axis.imshow(row.swapaxes(0, 1).reshape(10, -1), cmap="gray", vmin=0, vmax=WHITE)
            axis.set(xticks=[], yticks=[], facecolor=SKY)
            axis.grid(False)
            axis.spines[:].set_visible(False)
            axis.set_ylabel(name, rotation=0, ha="right", va="center")
        save(figure, path)


def main(folder: str, out: str = ""):
    """Scores every set, and prints the tables."""
    run = ntm_jax.load(folder)
    splits = {split: run.config.data.open(split).records for split in ("train", "test")}
    train, held_out = (np.stack([records[i]["image"] for i in range(len(records))])
                       for records in splits.values())
    sets = {"held-out digits": held_out} | other_images(held_out)
    parts = np.split(train[: PARTS * len(held_out)], PARTS)
    found = [likelihoods(run, images, seed) | simple(images, train)
             for seed, images in enumerate([*sets.values(), *parts])]
    reference = {name: np.concatenate([part[name] for part in found[len(sets):]])
                 for name in found[0]}
    both = {name: scores(one, reference, found[0]) for name, one in zip(sets, found, strict=False)}
    print("| images | log p(x), nats |\n|---|---|")
    log_p = {name: one["log_prob"] for name, one in zip(sets, found, strict=False)}
    black = log_p["constant"][sets["constant"].max((1, 2, 3)) == 0]
    for name, values in {"training digits": reference["log_prob"], **log_p,
                         "constant: black alone": black}.items():
        print(f"| {name} | {values.mean():.1f} ± {values.std(ddof=1) / len(values) ** 0.5:.1f} |")
    for kind in (0, 1):
        for names in (ALTERED, OTHER):
            print_table({name: two[kind] for name, two in both.items()}, names)
    if out:
        picture(sets, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

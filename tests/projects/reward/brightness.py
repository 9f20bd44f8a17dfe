"""The reward of the documentation's example, for --import of the programs."""

from ntm_jax.projects.reward import rewards


def _brightness(argument, source):
    def score(images, labels):
        values = images.mean((1, 2, 3)) / 255
        return rewards.Scores(values, [f"class_{label}" for label in labels])

    return score


rewards.register("brightness", _brightness)

"""The section `reward` of a configuration: post-training on a reward or on preferences."""

import dataclasses

from ntm_jax.typed import setting


@dataclasses.dataclass(frozen=True)
class Reward:
    """Post-training on a reward; see projects/reward."""

    name: str = setting(
        "", "What scores samples: shapes, classifier[:FILE], or a registered reward.")
    samples: int = setting(
        8, "Samples of each condition of a batch, whose rewards are compared.", low=2, high=65_536)
    updates: int = setting(1, "Optimizer steps on the same samples.", low=1)
    prefetch: bool = setting(
        False, "Draws the next batch's samples while the present ones are scored.")
    clip: float = setting(
        0.2, "Bounds the ratio of new to old density of a factor to 1 - clip, 1 + clip.", above=0,
        high=1)
    kl: float = setting(
        0.0, "Weight of the divergence from the reference model, in rewards per nat; DPO's beta.",
        low=0)
    novelty: float = setting(
        0.0, "Bonus for right samples with a rare trait, over how many show it.", low=0)
    diversity: float = setting(
        0.0, "Bonus for each sample's mean distance to its condition's others.", low=0)
    normalise: bool = setting(True, "Divides advantages by the std of a condition's rewards.")
    data_loss_weight: float = setting(
        0.5, "Weight of the NLL on the batch's data, which keeps the model near them.", low=0)
    trainable: str = setting(
        "predictor", "What learns.", choices=("predictor", "transporter", "both"))
    levels: tuple[int, ...] = setting(
        (), "First and last level, between which steps learn from rewards; () for all.", low=0)
    workers: int = setting(
        0, "Processes that score samples; 0 scores them in the training process.", low=0,
        high=1024)

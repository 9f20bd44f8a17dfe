"""Prints the phases of a training run as they begin, and makes each take two seconds more.

A program imports it by --import=tests.campaigns.phases.
"""

import time

from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.training import loop, objectives

NAMES = "restore", "compile", "training", "evaluation", "saving", "final evaluation"
FIRST = 7  # step from which training, evaluation and saving print, so some steps are saved before


def announced(name: str, function, when=lambda *_: True):
    def call(*arguments, **keywords):
        if when(*arguments):
            print(f"phase: {name}", flush=True)
            for _ in range(20):  # the signal's handler runs between them
                time.sleep(0.1)
        return function(*arguments, **keywords)
    return call


def late(run, *_) -> bool:
    return run.step >= FIRST


Checkpoints.restore = announced("restore", Checkpoints.restore)
Checkpoints.save = announced("saving", Checkpoints.save, lambda _, step, *rest: step >= FIRST)
Loop = loop._Loop
Loop._compile = announced("compile", Loop._compile)
Loop._take_step = announced("training", Loop._take_step, late)
loop.evaluate = announced("final evaluation", loop.evaluate)
checked = objectives.checked


def with_announced_evaluation(config):
    import dataclasses

    objective = checked(config)
    return dataclasses.replace(
        objective, held_out=announced("evaluation", objective.held_out, late))


objectives.checked = with_announced_evaluation

"""The learning rate of an iteration."""

import math

from stepcredit.learn.options import OptimOptions


def learning_rate(given: OptimOptions, iteration: int, iterations: int) -> float:
    """Linear warm-up over the first `warmup` iterations, then the schedule, whose decay begins behind it.

    The first iteration behind the warm-up has the given rate, the last one the smallest above 0. From there on, and
    always without a warm-up, it is `get_linear_schedule_with_warmup` and `get_cosine_schedule_with_warmup` of
    transformers with one step for each iteration. In the warm-up iteration i has i / (warmup + 1) of the rate here, and
    (i - 1) / warmup there, where the first step has rate 0 and so learns nothing.

    Args:
        iteration: 1 .. `iterations`.
    """
    if iteration <= given.warmup:
        return given.learning_rate * iteration / (given.warmup + 1)
    progress = (iteration - 1 - given.warmup) / (iterations - given.warmup)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return given.learning_rate * shape[given.schedule]

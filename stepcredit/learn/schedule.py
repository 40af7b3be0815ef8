"""The learning rate of an iteration."""

import math

from stepcredit.learn.options import OptimOptions


def learning_rate(given: OptimOptions, iteration: int, iterations: int) -> float:
    """Linear warm-up over the first `warmup` iterations, then the schedule, whose decay begins behind it.

    The first iteration behind the warm-up has the given rate, the last one the smallest above 0.

    Args:
        iteration: 1 .. `iterations`.
    """
    if iteration <= given.warmup:
        return given.learning_rate * iteration / (given.warmup + 1)
    progress = (iteration - 1 - given.warmup) / (iterations - given.warmup)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return given.learning_rate * shape[given.schedule]

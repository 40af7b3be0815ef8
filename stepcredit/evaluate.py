"""Accuracy on held-out problems, sampled and greedy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from stepcredit.build import Rollouts
from stepcredit.forest import Forest
from stepcredit.growth import flat, sampling_seed
from stepcredit.samplers.params import SamplingParams
from stepcredit.types import Problem

EVALUATION = 1  # stream of sampling seeds


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name (`eval/accuracy` ...) and the sampled forest they come from."""

    metrics: dict[str, float]
    sampled: Forest


def evaluate(rollouts: Rollouts, problems: Sequence[Problem], num_samples: int, greedy: bool, seed: int) -> Evaluation:
    """Sample `num_samples` completions of each problem, and one greedily.

    `eval/accuracy` is the share of sampled completions that the first reward function gives 1 or more,
    `eval/accuracy_greedy` the same at temperature 0, `eval/pass@k` the share of problems with at least one such among
    k = `num_samples`. Unjudged completions count as wrong.
    """
    seeds = [sampling_seed(seed, EVALUATION, number) for number in range(len(problems))]

    def completions(count: int, params: SamplingParams) -> Forest:
        return rollouts.judge(flat(rollouts.sampler, problems, rollouts.encode, count, params, seeds))

    sampled = completions(num_samples, rollouts.params)
    correct = _correct(sampled).reshape(len(problems), num_samples)
    metrics = {
        "eval/accuracy": float(correct.mean()),
        "eval/length": float(sampled.segment["length"].float().mean()),
    }
    if num_samples > 1:
        metrics[f"eval/pass@{num_samples}"] = float(correct.amax(1).mean())
    if greedy:
        at_zero = completions(1, replace(rollouts.params, temperature=0.0))
        metrics["eval/accuracy_greedy"] = float(_correct(at_zero).mean())
    return Evaluation(metrics, sampled)


def _correct(forest: Forest) -> torch.Tensor:
    """[num_completions] 1.0 where the first reward function is satisfied."""
    leaves = forest.segment["is_leaf"].nonzero().squeeze(1).tolist()
    first = [next(iter(forest.details[leaf]["rewards"].values())) for leaf in leaves]
    return torch.tensor([float(value is not None and value >= 1) for value in first])

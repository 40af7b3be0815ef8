"""Metrics of one iteration, computed from its finished forest."""

import torch

from stepcredit.config import Config
from stepcredit.forest import FINISH_CODE, Forest
from stepcredit.forest.ops import mean_by, segment_sum, spread_by
from stepcredit.forest.table import TERM
from stepcredit.run.by_source import NO_SOURCES, Sources


def forest_metrics(forest: Forest, config: Config | None = None, sources: Sources = NO_SOURCES) -> dict[str, float]:
    """Rewards, completions and credit of a forest that has `advantages`.

    See docs/metrics.md for each formula.

    Args:
        config: of the run, where there is one; with a process reward model it tells what `ref_logprobs` are.
        sources: that have metrics of their own.
    """
    leaf = forest.segment["is_leaf"] & ~forest.open
    judged = leaf & forest.segment["has_reward"]
    reward = forest.segment["reward"][judged]
    sampled = forest.token_sampled & ~forest.past
    metrics = {
        "reward/mean": _mean(reward),
        "reward/std": _std(reward),
        **_reward_parts(forest),
        **judging_shares(judging_counts(forest)),
        **_groups(forest, judged),
        "completion/masked": _mean((~forest.segment["mask"][judged]).float()),
        "completion/truncated": _mean((forest.segment["finish"][leaf] == FINISH_CODE["length"]).float()),
        "completion/length": _mean(_lengths(forest)[leaf]),
        "tokens/sampled": float(sampled.sum()),
        **_by_source(forest, judged, sources),
    }
    if "entropy" in forest.token:
        metrics["policy/entropy"] = _mean(forest.token["entropy"][sampled])
    if _has_kl_ref(forest, config):
        metrics["policy/kl_ref"] = _mean((forest.token["old_logprobs"] - forest.token["ref_logprobs"])[sampled])
    if "old_logprobs" in forest.token and "rollout_logprobs" in forest.token:
        metrics |= _mismatch(forest, config.objective.importance_cap if config else 2.0)
    if "kept" in forest.segment:
        metrics |= _siblings(forest)
    advantages = forest.token["advantages"][forest.active]
    metrics["credit/std"] = _std(advantages)
    process = forest.token["process"][forest.active] if "process" in forest.token else torch.zeros_like(advantages)
    outcome = advantages - process
    outcome_rms = _rms(outcome)
    metrics["credit/outcome_rms"] = outcome_rms
    if "process" in forest.token:
        process_rms = _rms(process)
        metrics["credit/process_rms"] = process_rms
        if outcome_rms > 0:
            metrics["credit/process_ratio"] = process_rms / outcome_rms
        else:
            metrics["credit/process_ratio"] = float("inf") if process_rms > 0 else 0.0
    for name in forest.token:
        if name.startswith(TERM):
            metrics[f"credit/rms/{name.removeprefix(TERM)}"] = _rms(forest.token[name][forest.active])
    return metrics


def _mismatch(forest: Forest, cap: float) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's of the same tokens."""
    log_ratio = (forest.token["old_logprobs"] - forest.token["rollout_logprobs"])[forest.fresh]
    ratio = log_ratio.exp()
    return {
        "sampler/logprob_diff": float(log_ratio.abs().max()) if len(log_ratio) else 0.0,
        "sampler/logprob_diff_mean": _mean(log_ratio.abs()),
        "sampler/ratio": _mean(ratio),
        "sampler/truncated": _mean((ratio > cap).float()),
    }


def _groups(forest: Forest, judged: torch.Tensor) -> dict[str, float]:
    """Shares of groups whose outcomes are all equal, and of groups with a single judged completion."""
    tree, reward = forest.segment["tree"], forest.segment["reward"]
    spread = torch.zeros(forest.num_trees).index_copy(0, tree, spread_by(reward, tree, where=judged))
    size = segment_sum(judged.float(), tree, forest.num_trees)
    return {
        "group/uniform": _mean(((spread == 0) & (size > 1)).float()),
        "group/singleton": _mean((size == 1).float()),
        "group/unjudged": _mean((size == 0).float()),
    }


def _siblings(forest: Forest) -> dict[str, float]:
    """Sizes of the trees; over all depths and for each the share of sibling groups kept, and spreads."""
    judged, depth, kept = forest.judged, forest.segment["depth"], forest.segment["kept"]
    _, size = mean_by(judged.float(), forest.siblings, where=judged)
    first = torch.zeros_like(judged)  # one segment of each group of at least two judged ones
    rows = (judged & (size > 1)).nonzero().squeeze(1)
    groups, number = forest.siblings[rows].unique(return_inverse=True)
    first[torch.zeros_like(groups).scatter_reduce(0, number, rows, "amin", include_self=False)] = True
    kept_groups = mean_by(kept.float(), forest.siblings, where=judged)[0] > 0
    sampled, token_segment = forest.token_sampled.float(), forest.token["segment"]
    tokens = segment_sum(sampled, token_segment, forest.num_segments).clamp(min=1)
    advantage = segment_sum(forest.token["advantages"] * sampled, token_segment, forest.num_segments) / tokens
    metrics = {
        "tree/segments": forest.num_segments / max(1, forest.num_trees),
        "tree/leaves": float(forest.segment["is_leaf"].sum()) / max(1, forest.num_trees),
        "group/siblings": float(first.sum()),
        "group/kept": _mean(kept_groups[first].float()),
    }
    for level in range(int(depth.max()) + 1 if len(depth) else 0):
        at_level = depth == level
        metrics[f"group/siblings_{level + 1}"] = float((first & at_level).sum())
        metrics[f"group/kept_{level + 1}"] = _mean(kept_groups[first & at_level].float())
        metrics[f"value/std_{level + 1}"] = _std(forest.segment["value"][judged & at_level])
        metrics[f"credit/std_{level + 1}"] = _std(advantage[kept & at_level])
    return metrics


def _by_source(forest: Forest, judged: torch.Tensor, sources: Sources) -> dict[str, float]:
    """Mean reward, length and number of groups of each source that is in the forest."""
    lengths, leaf = _lengths(forest), forest.segment["is_leaf"] & ~forest.open
    labels = [sources.label(problem.source) for problem in forest.problems]
    metrics = {}
    for label in sources.labels:
        trees = torch.tensor([each == label for each in labels])
        if trees.any():
            of_label = trees[forest.segment["tree"]]
            metrics[f"group/count/{label}"] = float(trees.sum())
            metrics[f"reward/mean/{label}"] = _mean(forest.segment["reward"][judged & of_label])
            metrics[f"completion/length/{label}"] = _mean(lengths[leaf & of_label])
    return metrics


def _lengths(forest: Forest) -> torch.Tensor:
    """[num_segments] sampled tokens from the prompt to the end of each segment."""
    length = forest.segment["length"] * forest.segment["sampled"]
    return (forest.sum_over_ancestors(length) + length).float()


def _reward_parts(forest: Forest) -> dict[str, float]:
    parts: dict[str, list[float]] = {}
    for detail in forest.details:
        for name, value in detail["rewards"].items():
            if value is not None:
                parts.setdefault(name, []).append(value)
    return {f"reward/{name}": sum(values) / len(values) for name, values in parts.items()} if len(parts) > 1 else {}


def judging_counts(forest: Forest) -> dict[str, float]:
    """Completions, those with a reward and its sum, and those on which a function ran out of time,
    went wrong, or that no function is for."""
    leaf = forest.segment["is_leaf"] & ~forest.open
    judged = leaf & forest.segment["has_reward"]
    failed = [set(detail["extra"].get("failures", {}).values()) for detail in forest.details]
    return {
        "completions": float(leaf.sum()),
        "judged": float(judged.sum()),
        "reward": float(forest.segment["reward"][judged].sum()),
        **{kind: float(sum(kind in kinds for kinds in failed)) for kind in ("timeout", "error", "unfit")},
    }


def judging_shares(counts: dict[str, float]) -> dict[str, float]:
    """The metrics that `judging_counts` come to."""
    total = max(1.0, counts["completions"])
    return {f"reward/{name}": counts[name] / total for name in ("judged", "timeout", "error", "unfit")}


def _has_kl_ref(forest: Forest, config: Config | None) -> bool:
    """Whether `old_logprobs` and `ref_logprobs` are those of the policy, now and at first, at one temperature.

    The reference of a process reward model may be another model or the policy itself, and is at temperature 1.
    """
    if "ref_logprobs" not in forest.token or "old_logprobs" not in forest.token:
        return False
    if config is None or "prm_logprobs" not in forest.token:
        return True
    given = config.prm
    return given.model is None and given.reference == "start" and config.sampler.temperature == 1


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt()) if len(values) else 0.0


def _std(values: torch.Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0


def _mean(values: torch.Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0

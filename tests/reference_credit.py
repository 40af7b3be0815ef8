"""The credit functions once more, slowly: plain Python over completions, written from the papers' formulas.

`advantages(name, trees, **options)` gives one number per token, in the order of the trees, segments and tokens;
`steps(name, tree, **options)` what a credit of trees says of each segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import fsum, sqrt
from statistics import mean, stdev
from typing import NamedTuple

from stepcredit.forest.types import Tree

EPS = 1e-6


@dataclass
class Completion:
    """A judged root-to-leaf path, over its sampled tokens: `rows` are (segment, offset)."""

    reward: float
    rows: list[tuple[int, int]]
    columns: dict[str, list[float]]

    @property
    def token_rewards(self) -> list[float]:
        return self.columns.get("token_rewards") or [0.0] * len(self.rows)

    @property
    def total(self) -> float:
        return self.reward + fsum(self.token_rewards)

    def to_go(self, gamma: float) -> list[float]:
        rewards = list(self.token_rewards)
        rewards[-1] += self.reward
        return [fsum(gamma ** (s - t) * rewards[s] for s in range(t, len(rewards))) for t in range(len(rewards))]

    def same(self, value: float) -> list[float]:
        return [value] * len(self.rows)


Group = list[Completion]
Rows = list[list[float]]


def paths(tree: Tree) -> list[list[int]]:
    """The segments of each root-to-leaf path, leaves in their order."""
    parents = {segment.parent for segment in tree.segments}
    found = []
    for index in range(len(tree.segments)):
        if index in parents:
            continue
        path = [index]
        while tree.segments[path[0]].parent >= 0:
            path.insert(0, tree.segments[path[0]].parent)
        found.append(path)
    return found


def judged_completions(tree: Tree) -> Group:
    group = []
    for path in paths(tree):
        reward = tree.segments[path[-1]].reward
        sampled = [index for index in path if tree.segments[index].sampled]
        if reward is None or not sampled:
            continue
        rows = [(index, offset) for index in sampled for offset in range(len(tree.segments[index].token_ids))]
        names = {name for index in sampled for name in tree.segments[index].columns}
        columns = {
            name: [tree.segments[i].columns[name][k] if name in tree.segments[i].columns else 0.0 for i, k in rows]
            for name in names
        }
        group.append(Completion(reward, rows, columns))
    return group


def z_score(totals: list[float], index: int) -> float:
    if len(totals) < 2 or len(set(totals)) == 1:
        return 0.0
    return (totals[index] - mean(totals)) / (stdev(totals) + EPS)


def grpo(group: Group) -> Rows:
    totals = [one.total for one in group]
    return [one.same(z_score(totals, i)) for i, one in enumerate(group)]


def dr_grpo(group: Group) -> Rows:
    centre = mean(one.total for one in group)
    return [one.same(one.total - centre) for one in group]


def prompt_baseline(group: Group) -> Rows:
    return [one.same(one.total - 0.25) for one in group]


def rloo(group: Group) -> Rows:
    return reward_to_go_baseline(group, lambda one: one.same(one.total))


def reward_to_go_baseline(group: Group, returns) -> Rows:
    result = []
    for one in group:
        others = [other.total for other in group if other is not one]
        result.append([x - mean(others) for x in returns(one)] if others else one.same(0.0))
    return result


def opo(group: Group, leave_one_out: bool = False) -> Rows:
    result = []
    for one in group:
        used = [other for other in group if not (leave_one_out and other is one)]
        if len(group) == 1:
            result.append(one.same(0.0))
            continue
        baseline = fsum(len(o.rows) * o.total for o in used) / sum(len(o.rows) for o in used)
        result.append(one.same(one.total - baseline))
    return result


def reward_to_go(group: Group, gamma: float = 1.0, baseline: str = "leave_one_out") -> Rows:
    if baseline == "none":
        return [one.to_go(gamma) for one in group]
    if baseline == "leave_one_out":
        return reward_to_go_baseline(group, lambda one: one.to_go(gamma))
    if len(group) == 1:
        return [group[0].same(0.0)]
    centre = mean(one.total for one in group)
    return [[x - centre for x in one.to_go(gamma)] for one in group]


def msa(group: Group, beta: float = 0.05, cumsum: bool = True) -> Rows:
    """Eq. 12 of SPRO: cumulative log-ratio less the mean over the completions that reach the same index."""
    cpr = []
    for one in group:
        ratio = [a - b for a, b in zip(one.columns["old_logprobs"], one.columns["ref_logprobs"], strict=True)]
        cpr.append([beta * (fsum(ratio[: t + 1]) if cumsum else ratio[t]) for t in range(len(ratio))])
    return [[x - mean(row[t] for row in cpr if len(row) > t) for t, x in enumerate(own)] for own in cpr]


def spro_process(
    groups: list[Group],
    beta: float = 0.05,
    uniform: str = "keep",
    normalize: str = "none",
    sign: float = 1.0,
    cumsum: bool = True,
) -> list[Rows]:
    parts = []
    for group in groups:
        dropped = uniform == "drop" and len({one.total for one in group}) < 2
        factor = 0.0 if dropped else sign
        parts.append([[factor * x for x in row] for row in msa(group, beta, cumsum)])
    return whitened(parts) if normalize == "batch" else parts


def whitened(groups: list[Rows]) -> list[Rows]:
    every = [x for group in groups for row in group for x in row]
    if len(every) < 2 or len(set(every)) == 1:
        return [[[0.0] * len(row) for row in group] for group in groups]
    centre, spread = mean(every), stdev(every)
    return [[[(x - centre) / (spread + EPS) for x in row] for row in group] for group in groups]


def spro(groups: list[Group], **options) -> list[Rows]:
    return added([grpo(group) for group in groups], spro_process(groups, **options))


def added(outcome: list[Rows], process: list[Rows]) -> list[Rows]:
    return [
        [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(left, right, strict=True)]
        for left, right in zip(outcome, process, strict=True)
    ]


def prime_process(
    groups: list[Group],
    beta: float = 0.05,
    gamma: float = 1.0,
    estimator: str = "rloo",
    process_coef: float = 1.0,
    centering: str = "paper",
    batch_norm: bool = False,
    last_token: str = "keep",
) -> list[Rows]:
    """The sum over s >= t of the centred implicit rewards, term by term."""
    x = []
    for group in groups:
        pairs = [zip(one.columns["prm_logprobs"], one.columns["ref_logprobs"], strict=True) for one in group]
        x.append([[beta * (a - b) for a, b in rows] for rows in pairs])
    if last_token == "zero":
        x = [[[*row[:-1], 0.0] for row in group] for group in x]
    if batch_norm:
        largest = max(abs(fsum(row[t:])) for group in x for row in group for t in range(len(row)))
        x = [[[value / (largest + EPS) for value in row] for row in group] for group in x]
    result = []
    for group in x:
        result.append([])
        for i, row in enumerate(group):
            centred = [prime_centred(group, i, value, estimator, centering) for value in row]
            later = [[gamma ** (s - t) * centred[s] for s in range(t, len(row))] for t in range(len(row))]
            result[-1].append([process_coef * fsum(terms) for terms in later])
    return result


def prime_centred(group: Rows, index: int, value: float, estimator: str, centering: str) -> float:
    """One implicit reward of completion `index` less its baseline."""
    means, size = [mean(row) for row in group], len(group)
    if estimator == "reinforce":
        return value
    if size == 1:
        return 0.0
    if estimator == "grpo":
        same = max(means) - min(means) <= EPS
        return 0.0 if same else (value - mean(means)) / (stdev(means) + EPS)
    if centering == "authors":
        return value * size / (size - 1) - fsum(means) / (size - 1)
    return value - mean(means[:index] + means[index + 1 :])


def prime(groups: list[Group], outcome_coef: float = 1.0, whitening: bool = False, **options) -> list[Rows]:
    of_group = {
        "rloo": rloo,
        "grpo": grpo,
        "reinforce": lambda group: [one.same(one.total) for one in group],
    }[options.get("estimator", "rloo")]
    outcome = [[[outcome_coef * x for x in row] for row in of_group(group)] for group in groups]
    total = added(outcome, prime_process(groups, **options))
    return whitened(total) if whitening else total


def reinforce_pp(groups: list[Group], gamma: float = 1.0) -> list[Rows]:
    return whitened([[one.to_go(gamma) for one in group] for group in groups])


def reinforce_pp_baseline(groups: list[Group]) -> list[Rows]:
    return whitened([dr_grpo(group) if group else [] for group in groups])


def vine(group: Group) -> Rows:
    """Each step: its rewards, and the value after it less the value before it."""
    result = []
    for one in group:
        number, value = one.columns["step_index"], [*one.columns["prefix_value"], one.reward]
        first = [t for t in range(len(number)) if t == 0 or number[t] != number[t - 1]]
        row: list[float] = []
        for start, end in zip(first, [*first[1:], len(number)], strict=True):
            row += [fsum(one.token_rewards[start:end]) + value[end] - value[start]] * (end - start)
        result.append(row)
    return result


# ---------------------------------------------------------------------- trees, in exact fractions


class Step(NamedTuple):
    """A segment; its value is None where it is unjudged."""

    value: Fraction | None
    advantage: float
    kept: bool


def value(tree: Tree, index: int) -> Fraction | None:
    """Its own token rewards, and the leaf's reward or the mean value of the judged children."""
    segment = tree.segments[index]
    children = [child for child, other in enumerate(tree.segments) if other.parent == index]
    judged = [found for child in children if (found := value(tree, child)) is not None]
    if not judged and (children or segment.reward is None):
        return None
    own = segment.columns.get("token_rewards", []) if segment.sampled else []
    return sum(map(Fraction, own), mean(judged) if judged else Fraction(segment.reward))


def treerpo(
    own: Fraction, group: list[Fraction], scale: str = "variance", tau: float = 0.1, at_tau: str = "drop"
) -> tuple[float, bool]:
    """Eq. 4 of TreeRPO with its divisor and others, and whether the range of the group is above tau."""
    spread, limit, centre = max(group) - min(group), Fraction(str(tau)), mean(group)
    kept = spread > limit or (at_tau == "keep" and spread == limit)
    if spread == 0:
        return 0.0, kept
    divisor = {
        "variance": lambda: centre * (1 - centre) + EPS,
        "sqrt": lambda: sqrt(centre * (1 - centre)) + EPS,
        "std": lambda: stdev(group) + EPS,
        "none": lambda: 1.0,
    }[scale]()
    return float(own - centre) / float(divisor), kept


def spo_tree(own: Fraction, group: list[Fraction]) -> tuple[float, bool]:
    advantage = own - mean(group)
    return float(advantage), advantage != 0


def remax(group: Group, greedy: float) -> Rows:
    return [one.same(one.total - greedy) for one in group]


def gpg(groups: list[Group], alpha: str = "varied") -> list[Rows]:
    everyone = [one for group in groups for one in group]
    varied = [one for group in groups for one in group if len({other.total for other in group}) > 1]
    counted = {"varied": varied, "nonzero": [one for one in everyone if one.total], "none": everyone}[alpha]
    scale = len(everyone) / max(1, len(counted))
    return [[[scale * x for x in row] for row in dr_grpo(group)] if group else [] for group in groups]


BY_SIBLINGS = {"treerpo": treerpo, "spo_tree": spo_tree}


def steps(name: str, tree: Tree, **options) -> list[Step]:
    """Every segment compared with the judged ones that follow the same segment, or the prompt."""
    values = [value(tree, index) for index in range(len(tree.segments))]
    found = []
    for own, segment in zip(values, tree.segments, strict=True):
        beside = [x for x, other in zip(values, tree.segments, strict=True) if other.parent == segment.parent]
        group = [x for x in beside if x is not None]
        found.append(Step(None, 0.0, False) if own is None else Step(own, *BY_SIBLINGS[name](own, group, **options)))
    return found


BY_GROUP = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "opo": opo,
    "reward_to_go": reward_to_go,
    "prompt_baseline": prompt_baseline,
    "vine": vine,
}
BY_BATCH = {
    "gpg": gpg,
    "spro": spro,
    "spro_process": spro_process,
    "prime": prime,
    "prime_process": prime_process,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}


def advantages(name: str, trees: Sequence[Tree], **options) -> list[float]:
    """One number per token of the trees; 0 for unsampled tokens and unjudged completions."""
    if name in BY_SIBLINGS:
        return [
            step.advantage * segment.sampled
            for tree in trees
            for step, segment in zip(steps(name, tree, **options), tree.segments, strict=True)
            for _ in segment.token_ids
        ]
    groups = [judged_completions(tree) for tree in trees]
    if name == "vine" and options.pop("whitening", False):
        values = whitened([vine(group) for group in groups])
    elif name == "remax":
        values = [remax(group, len(tree.prompt_ids) % 3 / 2) for group, tree in zip(groups, trees, strict=True)]
    elif name in BY_BATCH:
        values = BY_BATCH[name](groups, **options)
    else:
        values = [BY_GROUP[name](group, **options) if group else [] for group in groups]
    result: list[float] = []
    for tree, group, rows in zip(trees, groups, values, strict=True):
        by_row = {
            key: value
            for completion, row in zip(group, rows, strict=True)
            for key, value in zip(completion.rows, row, strict=True)
        }
        for index, segment in enumerate(tree.segments):
            result += [by_row.get((index, offset), 0.0) for offset in range(len(segment.token_ids))]
    return result

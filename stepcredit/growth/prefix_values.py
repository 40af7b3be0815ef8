"""Values of prefixes by Monte Carlo: the mean reward of continuations from the start of every step of a completion.

A prefix is continued as a segment that was not sampled, so judges see whole completions and need no change. Prefixes
that several completions share (the prompt above all) are continued once. The longest prefix of every completion is
continued first, so that a sampler which keeps prefixes computes the keys and values of a completion once; the shorter
ones are cut off it.

Each prefix has a seed of its own, made from its tokens: its continuations depend neither on the other completions, nor
on their order, nor on how they are spread over processes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev, pvariance

import torch
from torch import Tensor

from stepcredit.credit.base import completions
from stepcredit.errors import UserError
from stepcredit.forest import FINISH_CODE, Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.growth.options import PrefixValueOptions
from stepcredit.growth.steps import StepRule
from stepcredit.processes.ranks import SINGLE_PROCESS, Ranks
from stepcredit.samplers.base import Sampler
from stepcredit.samplers.params import SamplingParams
from stepcredit.seeds import PREFIX_VALUES, mixed

COLUMNS = ("prefix_value", "prefix_error", "prefix_rollouts", "step_index")  # of tokens, that `with_values` adds

Prefix = tuple[int, tuple[int, ...]]  # row of the tree table, tokens of a completion so far (none: the prompt)
Returns = Mapping[Prefix, Sequence[float]]  # of the judged continuations, in the order in which they were drawn


@dataclass(frozen=True)
class Steps:
    """A judged completion and where its steps start.

    Attributes:
        leaf, tree: rows of the segment and the tree table.
        rows: [length] of the token table.
        token_ids: of the whole completion.
        starts: tokens before each step, 0 first, rising.
        total: its return: the outcome reward and the rewards inside it.
    """

    leaf: int
    tree: int
    rows: Tensor
    token_ids: tuple[int, ...]
    starts: tuple[int, ...]
    total: float

    @property
    def prefixes(self) -> list[Prefix]:
        return [(self.tree, self.token_ids[:start]) for start in self.starts]


def steps_of(forest: Forest, rule: StepRule, max_steps: int = 0) -> list[Steps]:
    """The judged completions of a flat forest, cut into steps.

    Args:
        max_steps: most steps of a completion; the last one takes the rest. 0: no limit.

    Raises:
        UserError: a completion has tokens that were not sampled.
    """
    forest.require_flat("prefix values")
    unsampled = (~forest.segment["sampled"]).nonzero()
    if len(unsampled):
        raise UserError(
            f"prefix values: {forest.describe_segment(int(unsampled[0]))} was not sampled (a tool or a user wrote it); "
            "continuations would go on without them, so their rewards would be those of another task"
        )
    order = torch.argsort(forest.leaf[forest.token["segment"]] * (forest.num_tokens + 1) + forest.token["position"])
    lengths = torch.bincount(forest.leaf[forest.token["segment"]], minlength=forest.num_segments)
    rows_of = dict(enumerate(order.split(lengths.tolist())))
    judged = completions(forest)
    found = []
    for leaf, tree, total in zip(judged.leaf.tolist(), judged.tree.tolist(), judged.returns.tolist(), strict=True):
        token_ids = tuple(forest.token["token_ids"][rows_of[leaf]].tolist())
        most = max_steps - 1 if max_steps else len(token_ids)
        starts = (0, *rule.ends(token_ids, most))
        found.append(Steps(leaf, tree, rows_of[leaf], token_ids, starts, total))
    return found


# ---------------------------------------------------------------------- a budget


@dataclass(frozen=True)
class Plan:
    """Which prefixes are continued, and how often.

    Attributes:
        every: of the steps of a completion only every so many-th is told apart, to stay within the budget.
    """

    steps: list[Steps]
    num_rollouts: int
    every: int = 1


def plan(steps: Sequence[Steps], num_rollouts: int, max_tokens: int = 0) -> Plan:
    """Fewer rollouts, and where one is too many fewer steps, so that a budget of tokens holds.

    What a rollout will cost is how long the completions themselves go on from there. It is known before anything is
    sampled, so that what is left out does not depend on how rollouts turn out, which would bias the values.

    Raises:
        UserError: not even one rollout of each prompt fits.
    """
    every = 1
    while True:
        thinned = [_thinned(each, every) for each in steps]
        cost = _cost_of_one(thinned)
        if max_tokens == 0 or cost <= max_tokens:
            most = num_rollouts if max_tokens == 0 else min(num_rollouts, int(max_tokens / max(cost, 1.0)))
            return Plan(thinned, max(1, most), every)
        if all(len(each.starts) == 1 for each in thinned):
            raise UserError(
                f"prefix_values.max_tokens: {max_tokens} tokens are fewer than one rollout of each prompt takes (about "
                f"{math.ceil(cost)}); give more, or 0 for no limit"
            )
        every *= 2


def _thinned(steps: Steps, every: int) -> Steps:
    return Steps(steps.leaf, steps.tree, steps.rows, steps.token_ids, steps.starts[::every], steps.total)


def _cost_of_one(steps: Sequence[Steps]) -> float:
    """Tokens that one rollout from every prefix is expected to take."""
    ahead: dict[Prefix, list[int]] = {}
    for each in steps:
        for start, prefix in zip(each.starts, each.prefixes, strict=True):
            ahead.setdefault(prefix, []).append(len(each.token_ids) - start)
    return sum(map(fmean, ahead.values()))


# ---------------------------------------------------------------------- rollouts


@dataclass
class Count:
    """What rollouts took.

    Attributes:
        sampled: tokens of continuations.
        encoded: tokens of prefixes whose keys and values were computed. A sampler that does not say so is counted as
            if it computed every prefix once from its start, which is the most that it can be.
        drawn, unjudged, truncated: continuations, those without a reward, and those that ended at the length limit.
    """

    sampled: int = 0
    encoded: int = 0
    drawn: int = 0
    unjudged: int = 0
    truncated: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def overhead(self) -> float:
        """All computed tokens in units of the sampled ones."""
        return (self.sampled + self.encoded) / max(1, self.sampled)


@dataclass
class Rollouts:
    """Draws and judges continuations.

    Args:
        judge: gives the leaves of a forest their rewards.
        seed: of the run.
    """

    sampler: Sampler
    params: SamplingParams
    judge: Callable[[Forest], Forest]
    seed: int = 0
    ranks: Ranks = SINGLE_PROCESS
    count: Count = field(default_factory=Count)

    def returns(self, forest: Forest, prefixes: Sequence[Prefix], num_rollouts: int, part: int = 0) -> Returns:
        """`num_rollouts` continuations of each prefix; those that have no reward are left out.

        Args:
            part: another one draws other continuations of the same prefixes.

        Raises:
            UserError: a prefix leaves no room for a token.
        """
        mine = self.ranks.share(list(_chains(prefixes)))
        longest = [chain[0] for chain in mine]
        shorter = [prefix for chain in mine for prefix in chain[1:]]
        own: dict[Prefix, list[float]] = {}
        count = Count()
        for wave in (longest, shorter):
            if wave:
                found, taken = self._wave(forest, wave, num_rollouts, part)
                own |= found
                count += taken
        returns: dict[Prefix, list[float]] = {}
        for theirs, taken in self.ranks.gather((own, count)):
            returns |= theirs
            self.count += taken
        return returns

    def _wave(
        self, forest: Forest, prefixes: Sequence[Prefix], num_rollouts: int, part: int
    ) -> tuple[dict[Prefix, list[float]], Count]:
        trees = {tree: _tree_of(forest, tree) for tree in {tree for tree, _ in prefixes}}
        limits = [self._limit(trees[tree][0], tokens) for tree, tokens in prefixes]
        rows = [[*trees[tree][1], *tokens] for tree, tokens in prefixes]
        seeds = [
            mixed(self.seed, PREFIX_VALUES, trees[tree][2], part, *row)
            for (tree, _), row in zip(prefixes, rows, strict=True)
        ]
        before = getattr(self.sampler, "encoded_tokens", None)
        groups = self.sampler.sample(rows, num_rollouts, self.params, seeds, limits, _nothing_more)
        after = getattr(self.sampler, "encoded_tokens", None)
        encoded = sum(map(len, rows)) if before is None or after is None else after - before
        judged = self.judge(
            Forest.from_trees(
                [
                    Tree(*trees[tree][:2], list(_continued(tokens, group)))
                    for (tree, tokens), group in zip(prefixes, groups, strict=True)
                ]
            )
        )
        ends = completions(judged)
        found: dict[Prefix, list[float]] = {prefix: [] for prefix in prefixes}
        for number, total in zip(ends.tree.tolist(), ends.returns.tolist(), strict=True):
            found[prefixes[number]].append(total)
        leaves = judged.segment["is_leaf"]
        truncated = int((judged.segment["finish"][leaves] == FINISH_CODE["length"]).sum())
        drawn = len(prefixes) * num_rollouts
        return found, Count(int(judged.token_sampled.sum()), encoded, drawn, drawn - len(ends.leaf), truncated)

    def _limit(self, problem: Problem, tokens: Sequence[int]) -> int:
        """Most tokens of a continuation, so that the whole completion keeps to `max_new_tokens`."""
        left = self.params.max_new_tokens - len(tokens)
        if left < 1:
            raise UserError(
                f"prefix values: problem '{problem.id}' has a step after {len(tokens)} tokens, and "
                f"sampler.max_new_tokens is {self.params.max_new_tokens}; give what the completions were sampled with"
            )
        return left


def _tree_of(forest: Forest, tree: int) -> tuple[Problem, list[int], int]:
    """Problem and prompt of a tree, and the version of the weights that sampled it."""
    start, length = int(forest.tree["prompt_start"][tree]), int(forest.tree["prompt_length"][tree])
    version = int(forest.tree["version"][tree]) if "version" in forest.tree else 0
    return forest.problems[tree], forest.prompt_ids[start : start + length].tolist(), version


def _continued(tokens: Sequence[int], group: Sequence[Segment]) -> Iterator[Segment]:
    """Each continuation behind a segment of its own that holds the prefix and was not sampled."""
    for number, one in enumerate(group):
        if tokens:
            yield Segment(tokens, finish="cut", sampled=False)
        yield Segment(one.token_ids, 2 * number if tokens else -1, one.finish)


def _nothing_more(token_ids: list[int]) -> int:
    """`num_reusable`: later prompts begin with prompts of this call, with nothing of its completions."""
    return 0


def _chains(prefixes: Sequence[Prefix]) -> Iterator[list[Prefix]]:
    """Each prefix that no other one begins with, and behind it those that it begins with (each once)."""
    chain: list[Prefix] = []
    for prefix in sorted(set(prefixes), reverse=True):  # what begins with a prefix stands right before it
        if chain and not _begins_with(chain[-1], prefix):
            yield chain
            chain = []
        chain.append(prefix)
    if chain:
        yield chain


def _begins_with(longer: Prefix, prefix: Prefix) -> bool:
    return longer[0] == prefix[0] and longer[1][: len(prefix[1])] == prefix[1]


# ---------------------------------------------------------------------- more rollouts where they matter


def measure(rollouts: Rollouts, forest: Forest, made: Plan, given: PrefixValueOptions) -> Returns:
    """The returns of continuations from every prefix of a plan.

    With `given.adaptive` that share of the rollouts is held back and then drawn only where the values of a step's
    neighbours (the step before, the step after, and what the completion came to) vary: by more than a quarter of the
    range of returns. The prefix's own returns have no say in it, because a mean that is drawn on for as long as it
    looks uncertain is biased.
    """
    prefixes = dict.fromkeys(prefix for each in made.steps for prefix in each.prefixes)
    if given.start == "group":
        several = {tree for tree, times in Counter(each.tree for each in made.steps).items() if times > 1}
        prefixes = dict.fromkeys(prefix for prefix in prefixes if prefix[1] or prefix[0] not in several)
    held_back = int(made.num_rollouts * given.adaptive)
    returns = rollouts.returns(forest, list(prefixes), made.num_rollouts - held_back)
    if not held_back:
        return returns
    varying = _among_neighbours_that_vary(made.steps, returns)
    chosen = [prefix for prefix in prefixes if prefix in varying]
    more = rollouts.returns(forest, chosen, held_back, part=1)
    return {prefix: [*first, *more.get(prefix, ())] for prefix, first in returns.items()}


def _among_neighbours_that_vary(steps: Sequence[Steps], returns: Returns) -> set[Prefix]:
    """Prefixes whose neighbours' returns have a deviation above a quarter of the range of their group's returns."""
    beside: dict[Prefix, dict[Prefix | int, Sequence[float]]] = {}
    ends: dict[int, tuple[float, float]] = {}
    for each in steps:
        low, high = ends.get(each.tree, (0.0, 1.0))
        ends[each.tree] = min(low, each.total), max(high, each.total)
        path: list[Prefix | int] = [*each.prefixes, each.leaf]
        for place, prefix in enumerate(each.prefixes):
            for neighbour in (*path[max(0, place - 1) : place], path[place + 1]):
                own = [each.total] if isinstance(neighbour, int) else returns.get(neighbour, ())
                if own:
                    beside.setdefault(prefix, {})[neighbour] = own
    found = set()
    for prefix, near in beside.items():
        variance = fmean(map(pvariance, near.values())) + pvariance([fmean(own) for own in near.values()])
        low, high = ends[prefix[0]]
        if math.sqrt(variance) > (high - low) / 4:
            found.add(prefix)
    return found


# ---------------------------------------------------------------------- values


def soft_mean(values: Sequence[float], eta: float) -> float:
    """(1 / eta) log mean exp(eta x), eta above 0: the mean as eta goes to 0, the largest as it grows.

    >>> round(soft_mean([1.0, 0.0], 1.0), 4)  # log((e + 1) / 2)
    0.6201
    """
    largest = max(values)
    return largest + math.log(fmean(math.exp(eta * (value - largest)) for value in values)) / eta


def value_of(returns: Sequence[float], eta: float = 0.0) -> tuple[float, float]:
    """The mean of returns and its standard error.

    The error is that of n + 2 numbers: the returns and the ends of their range, which is [0, 1] or wider. So it is not
    0 where a few returns happen to be equal (Agresti and Coull's interval for shares, for any returns).

    Args:
        eta: above 0: the soft mean (1 / eta) log mean exp(eta r), the labels of ER-PRM (arXiv 2412.11006); 0: the mean,
            those of Math-Shepherd (arXiv 2312.08935). Its error is that of the mean of exp(eta r), carried through the
            logarithm.

    >>> value_of([1.0, 1.0, 0.0, 0.0])  # half of (1, 1, 0, 0, 0, 1), over the root of 4
    (0.5, 0.25)
    """
    ends = [min(0.0, *returns), max(1.0, *returns)]
    if eta == 0.0:
        return fmean(returns), pstdev([*returns, *ends]) / math.sqrt(len(returns))
    value = soft_mean(returns, eta)
    weights = [math.exp(eta * (each - value)) for each in (*returns, *ends)]  # of the returns, 1 on average
    return value, pstdev(weights) / eta / math.sqrt(len(returns))


def with_values(
    forest: Forest, steps: Sequence[Steps], returns: Returns, start: str = "rollouts", eta: float = 0.0
) -> tuple[Forest, list[Steps]]:
    """The forest with the token columns `COLUMNS`, and its completions with the steps that have a value.

    `step_index` numbers the steps of each completion from 0; `prefix_value`, `prefix_error` and `prefix_rollouts` are
    those of the prefix before the token's step. A step whose prefix has no judged continuation joins the step before
    it. A prompt without any has the mean of its group's completions, and so have judged completions that are not among
    `steps`, where their prompt has no value: they are one step. Unjudged completions have zeros.

    Args:
        start: "group" takes the mean of the group's other completions for the value of a prompt, where there are any.
        eta: as in `value_of`.
    """
    columns = {name: torch.zeros(forest.num_tokens) for name in COLUMNS}
    own = {each.leaf: each for each in steps}
    everyone = steps_of(forest, StepRule(), 1)
    totals: dict[int, dict[int, float]] = {}
    for each in everyone:
        totals.setdefault(each.tree, {})[each.leaf] = each.total
    kept = []
    for whole in everyone:
        each = own.get(whole.leaf, whole)
        known = [(s, returns[p]) for s, p in zip(each.starts, each.prefixes, strict=True) if s and returns.get(p)]
        others = [total for leaf, total in totals[each.tree].items() if leaf != each.leaf]
        first: Sequence[float] = others if start == "group" else ()
        first = first or returns.get((each.tree, ())) or list(totals[each.tree].values())
        known = [(0, first), *known]
        starts = [place for place, _ in known]
        lengths = torch.tensor([*starts[1:], len(each.token_ids)]) - torch.tensor(starts)
        values = torch.tensor([[*value_of(found, eta), len(found)] for _, found in known])
        table = torch.cat([values, torch.arange(len(known), dtype=torch.float32)[:, None]], 1)
        spread = table.repeat_interleave(lengths, 0)
        for name, column in zip(COLUMNS, spread.unbind(1), strict=True):
            columns[name][each.rows] = column
        if whole.leaf in own:
            kept.append(Steps(each.leaf, each.tree, each.rows, each.token_ids, tuple(starts), each.total))
    return forest.with_token(**columns), kept


def prefix_value_metrics(forest: Forest, steps: Sequence[Steps], made: Plan, count: Count) -> dict[str, float]:
    """What was measured and what it took (docs/metrics.md).

    Args:
        forest: with the columns of `with_values`.
        steps: those that have a value.
    """
    number = Counter(len(each.starts) for each in steps)
    firsts = [int(each.rows[place]) for each in steps for place in each.starts]
    return {
        "tokens/rollouts": float(count.sampled),
        "prefix/encoded": float(count.encoded),
        "prefix/overhead": count.overhead,
        "prefix/steps": sum(size * times for size, times in number.items()) / max(1, len(steps)),
        "prefix/rollouts": float(made.num_rollouts),
        "prefix/value": float(forest.token["prefix_value"][firsts].mean()) if firsts else 0.0,
        "prefix/error": float(forest.token["prefix_error"][firsts].mean()) if firsts else 0.0,
        "prefix/unjudged": count.unjudged / max(1, count.drawn),
        "prefix/truncated": count.truncated / max(1, count.drawn),
    }


def continue_from(
    rollouts: Rollouts, forest: Forest, rule: StepRule, given: PrefixValueOptions
) -> tuple[Forest, list[Steps], Plan, Returns]:
    """Plan, sample and average for all judged completions of a flat forest.

    Returns:
        The forest with the columns of `with_values`, its completions with the steps that have a value, the plan, and
        the returns of the continuations.
    """
    steps = steps_of(forest, rule, given.max_steps)
    made = plan(steps, given.num_rollouts, given.max_tokens)
    returns = measure(rollouts, forest, made, given)
    forest, kept = with_values(forest, made.steps, returns, given.start, given.eta)
    return forest, kept, made, returns

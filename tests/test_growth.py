"""Trees that grow: their shape, their limits, and that every path is a sample of the policy."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_models import STOP, fresh, tiny

from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment
from stepcredit.growth.flat import flat
from stepcredit.growth.options import TreeOptions
from stepcredit.growth.steps import StepRule, step_rule
from stepcredit.growth.tree import check_limits, tree
from stepcredit.policy.forward import score
from stepcredit.policy.loading import load_policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler

MODES = ("complete", "stepwise")
modes = pytest.mark.parametrize("mode", MODES)
PROBLEMS = [Problem(id=f"p{number}") for number in range(3)]
PROMPTS = {"p0": [5, 6, 7], "p1": [9], "p2": [11, 12, 13, 14, 15, 16, 17]}
DELIMITERS = frozenset(range(10, 40))


def encode(problem: Problem) -> list[int]:
    return PROMPTS[problem.id]


class Counting:
    """Samples without a model: tokens count upwards from what came before, rows that are asked to stop do."""

    stop_token_ids = (STOP,)

    def __init__(self, length: int | None = None) -> None:
        self.length, self.rows, self.calls = length, 0, []
        self.on_progress = lambda number: None
        self.max_rows = 1

    def sample(self, prompts, n, params, seeds, limits=None, num_reusable=None):
        self.calls.append((len(prompts), n, tuple(seeds)))
        self.rows += len(prompts) * n
        groups = []
        for prompt, limit in zip(prompts, limits or [params.max_new_tokens] * len(prompts), strict=True):
            done = len(prompt) - 3
            whole = [3 + (done + number) % 90 for number in range(limit)]
            if self.length is not None and done + limit >= self.length:
                whole = [*whole[: self.length - done - 1], STOP]
            stops = set(params.stop_token_ids or self.stop_token_ids)
            end = next((place for place, token in enumerate(whole, 1) if token in stops), len(whole))
            ids = whole[:end]
            columns = {"rollout_logprobs": [-1.0] * end}
            finish = "stop" if ids[-1] in stops else "length"
            groups.append([Segment(list(ids), finish=finish, columns=dict(columns)) for _ in range(n)])
        return groups

    def sync(self, policy) -> None:
        """Nothing to take over."""


def shape_of(
    num_branches: int, depth: int, rule: StepRule, mode: str = "complete", **limits: int
) -> tuple[TreeOptions, StepRule]:
    return TreeOptions(num_branches=num_branches, depth=depth, mode=mode, **limits), rule


def grown(
    shape: tuple[TreeOptions, StepRule], max_new_tokens: int = 24, sampler=None, problems=None, **options
) -> Forest:
    params = SamplingParams(max_new_tokens=max_new_tokens, **options)
    problems = PROBLEMS if problems is None else problems
    sampler = sampler or TransformersSampler(tiny("qwen3"))
    return tree(sampler, problems, encode, params, range(7, 7 + len(problems)), *shape)


def paths(forest: Forest) -> list[list[int]]:
    """Token ids of every completion."""
    found = []
    for leaf in forest.segment["is_leaf"].nonzero().squeeze(1).tolist():
        spans = [
            forest.token["token_ids"][start : start + length].tolist()
            for row in forest.completion_segments(leaf)
            for start, length in [(int(forest.segment["start"][row]), int(forest.segment["length"][row]))]
        ]
        found.append(list(itertools.chain(*spans)))
    return found


def children(forest: Forest) -> Counter:
    """The number of segments in each group of siblings."""
    return Counter(forest.siblings.tolist())


# ---------------------------------------------------------------------- shape


@modes
def test_a_full_tree(mode):
    """The paper's N 8, D 3 without early stops: 512 leaves, 584 segments, 73 groups of 8."""
    sampler = Counting()
    forest = grown(shape_of(8, 3, StepRule(4), mode), 12, sampler, PROBLEMS[:1])
    assert int(forest.segment["is_leaf"].sum()) == 512
    assert forest.num_segments == 584
    assert sorted(children(forest).values()) == [8] * 73
    assert forest.segment["length"].tolist() == [4] * 584
    assert forest.segment["depth"].bincount().tolist() == [8, 64, 512]
    assert sampler.rows == (512 if mode == "complete" else 584)


@modes
def test_every_level_is_one_call(mode):
    """All nodes of a level of all trees are sampled together, each with a seed of its own."""
    sampler = Counting()
    grown(shape_of(4, 3, StepRule(4), mode), 12, sampler)
    new = 3 if mode == "complete" else 4
    assert [call[:2] for call in sampler.calls] == [(3, 4), (12, new), (48, new)]
    seeds = [seed for _, _, some in sampler.calls for seed in some]
    assert len(set(seeds)) == len(seeds)


@modes
def test_early_stops_are_leaves_of_every_depth(mode):
    """A completion that ends in its second step has two segments; there is nothing below them."""
    forest = grown(shape_of(3, 3, StepRule(4), mode), 12, Counting(length=6), PROBLEMS[:1])
    assert forest.segment["depth"].bincount().tolist() == [3, 9]
    assert forest.segment["length"][forest.segment["is_leaf"]].tolist() == [2] * 9
    assert {segment.finish for one in forest.to_trees() for segment in one.segments} == {"cut", "stop"}


@modes
@pytest.mark.parametrize("length", [4, 8])
def test_a_stop_in_the_last_place_of_a_step_leaves_nothing_behind(mode, length):
    forest = grown(shape_of(2, 3, StepRule(4), mode), 12, Counting(length=length), PROBLEMS[:1])
    assert set(forest.segment["length"].tolist()) == {4}
    assert int(forest.segment["depth"].max()) == length // 4 - 1


@modes
def test_the_last_segment_runs_to_the_end(mode):
    """Whatever the rule says, and up to the limit of the whole completion."""
    forest = grown(shape_of(2, 2, StepRule(4), mode), 20, Counting(), PROBLEMS[:1])
    assert set(forest.segment["length"][forest.segment["depth"] == 1].tolist()) == {16}
    trees = forest.to_trees()
    assert all(one.finish == ("length" if one.parent >= 0 else "cut") for one in trees[0].segments)


@modes
def test_delimiters_end_steps(mode):
    """Each cut segment holds one delimiter, as its last token, or is as long as a step may be."""
    rule = StepRule(tokens=5, delimiters=DELIMITERS)
    forest = grown(shape_of(3, 4, rule, mode), 24)
    seen = Counter()
    for one in forest.to_trees():
        parents = {segment.parent for segment in one.segments}
        for index, segment in enumerate(one.segments):
            ids = list(segment.token_ids)
            if index in parents:
                assert not DELIMITERS & set(ids[:-1])
                assert ids[-1] in DELIMITERS or len(ids) == 5
                seen[ids[-1] in DELIMITERS] += 1
    assert seen[True] > 5 and seen[False] > 5
    assert set(children(forest).values()) == {3}


@modes
def test_segments_of_a_real_model(mode):
    """Siblings are N; leaves stop or fill the limit; nothing else does."""
    forest = grown(shape_of(3, 3, StepRule(3), mode), 9, stop_token_ids=tuple(range(8)))
    assert set(children(forest).values()) == {3}
    for one in forest.to_trees():
        one.validate()
    for leaf, path in zip(forest.segment["is_leaf"].nonzero().squeeze(1).tolist(), paths(forest), strict=True):
        stopped = int(forest.segment["finish"][leaf]) == 0
        assert (path[-1] < 8) == stopped and (stopped or len(path) == 9)
        assert min(path[:-1], default=8) >= 8
    assert forest.segment["is_leaf"].sum() > 30 and (forest.segment["finish"] == 1).any()


# ---------------------------------------------------------------------- what was sampled


def test_depth_one_is_the_flat_group():
    """The same seeds give the same tokens."""
    params, sampler = SamplingParams(max_new_tokens=12), TransformersSampler(tiny("qwen3"))
    group = flat(sampler, PROBLEMS, encode, params, range(7, 10), 4)
    for mode in MODES:
        one = grown(shape_of(4, 1, StepRule(4), mode), 12)
        assert one.token["token_ids"].equal(group.token["token_ids"])
        assert one.segment["parent"].equal(group.segment["parent"])


@modes
@pytest.mark.parametrize("keep_mb", [4096, 0, 0.004])
def test_reported_logprobs_are_those_of_the_policy(mode, keep_mb):
    """Whether prefixes are kept or encoded again: every token's log-probability on its path, and the same tokens."""
    policy = tiny("qwen3")
    shape = shape_of(3, 3, StepRule(3), mode)
    forest = grown(shape, 9, TransformersSampler(policy, keep_mb=keep_mb))
    scores = score(policy, forest, 1.0, 4096)
    torch.testing.assert_close(scores.logprobs, forest.token["rollout_logprobs"], atol=2e-4, rtol=0)
    assert forest.token["token_ids"].equal(grown(shape, 9).token["token_ids"])


@modes
@pytest.mark.parametrize("path", ["plain", "cached"])
def test_other_paths_grow_the_same_tree(mode, path):
    policy = fresh("qwen3")
    policy.scoring_form = path
    rule = StepRule(delimiters=DELIMITERS)
    found = grown(shape_of(2, 3, rule, mode), 10, TransformersSampler(policy))
    expected = grown(shape_of(2, 3, rule, mode), 10, TransformersSampler(fresh("qwen3")))
    assert found.token["token_ids"].equal(expected.token["token_ids"])


@modes
@pytest.mark.parametrize("max_rows", [1, 5])
def test_few_rows_change_nothing(mode, max_rows):
    shape = shape_of(3, 3, StepRule(3, DELIMITERS), mode)
    found = grown(shape, 12, TransformersSampler(tiny("qwen3"), max_rows))
    assert found.token["token_ids"].equal(grown(shape, 12).token["token_ids"])


@modes
def test_every_path_is_a_sample_of_the_policy(mode):
    """Mean frequency of two-token beginnings over many trees against their probabilities."""
    policy = fresh("qwen3", vocab_size=5, initializer_range=0.4)
    problems = [replace(PROBLEMS[0]) for _ in range(600)]
    shape = shape_of(2, 2, StepRule(delimiters=frozenset([0, 1])), mode)
    params = SamplingParams(max_new_tokens=3, stop_token_ids=(STOP,))
    prompt = [3, 4]
    forest = tree(TransformersSampler(policy), problems, lambda _: prompt, params, range(600), *shape)
    found: Counter = Counter()
    for one in forest.to_trees():
        for index, segment in enumerate(one.segments):
            if index in {other.parent for other in one.segments}:
                continue
            ids, weight = list(segment.token_ids), 0.5
            if segment.parent >= 0:
                ids, weight = [*one.segments[segment.parent].token_ids, *ids], 0.25
            found[tuple(ids[:2])] += weight / 600
    with torch.no_grad():
        first = policy.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        expected = {(STOP,): float(first[STOP])}
        for token in {0, 1, 3, 4}:
            second = policy.model(torch.tensor([[*prompt, token]])).logits[0, -1].softmax(-1)
            expected |= {(token, other): float(first[token] * second[other]) for other in range(5)}
    assert sum(found.values()) == pytest.approx(1)
    assert max(abs(found[key] - expected[key]) for key in expected) < 0.05


# ---------------------------------------------------------------------- limits


@modes
@pytest.mark.parametrize("limit", [9, 12, 20, 30, 38])
def test_segments_stay_within_their_limit(mode, limit):
    """A node that does not branch is one segment to its end."""
    forest = grown(shape_of(3, 3, StepRule(4), mode, max_segments=limit), 12, Counting(), PROBLEMS[:1])
    assert 3 <= forest.num_segments <= limit
    assert set(children(forest).values()) == {3}
    assert all(len(path) == 12 for path in paths(forest))
    if limit >= 20:
        assert int(forest.segment["depth"].max()) >= 1


@modes
@pytest.mark.parametrize("limit", [36, 60, 100, 200])
def test_tokens_stay_within_their_limit(mode, limit):
    shape = shape_of(3, 3, StepRule(4), mode, max_tokens=limit)
    forest = grown(shape, 12, Counting(), PROBLEMS[:1])
    assert 36 <= forest.num_tokens <= limit
    assert all(len(path) == 12 for path in paths(forest))
    real = grown(shape, 12, stop_token_ids=())
    assert real.segment["tree"].bincount().max() > (2 if limit < 60 else 5)
    assert (torch.bincount(real.token_tree) <= limit).all()


@modes
def test_without_limits_the_tree_is_the_largest(mode):
    whole = grown(shape_of(3, 3, StepRule(4), mode), 12, Counting(), PROBLEMS[:1])
    wide = shape_of(3, 3, StepRule(4), mode, max_segments=whole.num_segments, max_tokens=whole.num_tokens)
    assert grown(wide, 12, Counting(), PROBLEMS[:1]).num_segments == whole.num_segments == 39


@pytest.mark.parametrize(
    ("options", "named"), [({"max_segments": 8}, "growth.max_segments"), ({"max_tokens": 299}, "growth.max_tokens")]
)
def test_limits_that_are_too_small_are_refused(options, named):
    with pytest.raises(UserError, match=named):
        check_limits(shape_of(3, 3, StepRule(4), **options)[0], 100)


# ---------------------------------------------------------------------- where a step ends


def test_rules():
    """By number, by token, by whichever comes first; never at the very end."""
    assert StepRule(2).ends([1, 2, 3, 4], 9) == [2]
    assert StepRule(2).ends([1, 2, 3, 4, 5], 1) == [2]
    assert StepRule(delimiters=frozenset([7])).ends([7, 1, 7, 7], 9) == [1, 3]
    assert StepRule(3, frozenset([7])).ends([1, 7, 1, 1, 1, 7, 1], 9) == [2, 5, 6]
    assert StepRule(3).ends([1], 9) == []


def test_an_end_does_not_depend_on_what_follows():
    """A stopping time: longer completions have the ends of shorter ones, and perhaps more."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (60,), generator=generator).tolist()
    rule = StepRule(6, frozenset([3, 4]))
    for size in range(1, 60):
        assert rule.ends(ids[:size], 99) == [end for end in rule.ends(ids, 99) if end < size]


def test_delimiters_of_the_embedded_task():
    """The line's end is a word of its own."""
    tokenizer = load_policy("embedded", "cpu").tokenizer
    rule = step_rule(None, ["task"], tokenizer, (".",))
    assert rule.delimiters == {tokenizer.convert_tokens_to_ids(".")}
    assert step_rule(None, ["sentence"], tokenizer).delimiters == set(tokenizer.convert_tokens_to_ids([".", "?"]))
    with pytest.raises(UserError, match="no token of this tokenizer holds"):
        step_rule(None, ["\n\n"], tokenizer)
    with pytest.raises(UserError, match=r"growth\.step: give"):
        step_rule(None, [], tokenizer)

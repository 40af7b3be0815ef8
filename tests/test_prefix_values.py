"""Values of prefixes by rollouts, against a policy whose values are known; and VinePPO's credit from them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import flat_forest, is_near, run
from safetensors.torch import load_file

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.records import read_trees, write_trees
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.growth.options import PrefixValueOptions
from stepcredit.growth.prefix_values import (
    COLUMNS,
    Plan,
    Rollouts,
    continue_from,
    measure,
    plan,
    prefix_value_metrics,
    steps_of,
    value_of,
)
from stepcredit.growth.steps import StepRule
from stepcredit.policy.loading import load_policy
from stepcredit.processes.ranks import Ranks
from stepcredit.run.build import build_parts, build_rollouts
from stepcredit.samplers.params import SamplingParams

UP, DOWN, GOAL = 3, 4, 4  # tokens of a walk that starts at 2, wins at GOAL and loses at 0
EACH = StepRule(tokens=1)


def place(tokens) -> int:
    return 2 + sum(1 if token == UP else -1 for token in tokens)


def chance(tokens, up: float) -> float:
    """Of reaching the goal: the gambler's ruin."""
    if up in (0.0, 1.0):
        return float(up == 1.0)
    ratio = (1 - up) / up
    return (1 - ratio ** place(tokens)) / (1 - ratio**GOAL)


class Walk:
    """A sampler whose policy goes up with a known probability, whatever came before."""

    stop_token_ids = ()
    max_rows = 64

    def __init__(self, up: float) -> None:
        self.up, self.asked = up, []

    def sample(self, prompts, n, params, seeds, limits=None, num_reusable=None):
        self.asked += [tuple(prompt) for prompt in prompts]
        return [self._group(prompt, n, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _group(self, prompt, n, seed):
        noise, group = np.random.default_rng(seed), []
        for _ in range(n):
            tokens = list(prompt[1:])
            while 0 < place(tokens) < GOAL:
                tokens.append(UP if noise.random() < self.up else DOWN)
            group.append(Segment(tokens[len(prompt) - 1 :]))
        return group


def judge(forest: Forest) -> Forest:
    trees = forest.to_trees()
    for tree in trees:
        parents = {segment.parent for segment in tree.segments}
        for number, segment in enumerate(tree.segments):
            if number not in parents:
                above = tree.segments[segment.parent].token_ids if segment.parent >= 0 else []
                segment.reward = float(place([*above, *segment.token_ids]) == GOAL)
    return Forest.from_trees(trees)


WON, LOST = [UP, DOWN, UP, DOWN, UP, UP], [UP, DOWN, DOWN, UP, DOWN, DOWN]


def group(*walks, prompt=(1,)) -> Forest:
    ends = [Segment(list(walk), reward=float(place(walk) == GOAL)) for walk in walks]
    return Forest.from_trees([Tree(Problem(id="walk"), list(prompt), ends)])


def drawn(up: float, seed: int = 0, **options) -> Rollouts:
    return Rollouts(Walk(up), SamplingParams(max_new_tokens=10_000, **options), judge, seed)


def given(**options) -> PrefixValueOptions:
    return PrefixValueOptions(**options)


# ---------------------------------------------------------------------- values


def test_values_are_the_exact_ones_within_their_errors():
    forest, _, _, returns = continue_from(drawn(0.6), group(WON, LOST), EACH, given(num_rollouts=400))
    for walk in (WON, LOST):
        for start in range(len(walk)):
            value, error = value_of(returns[0, tuple(walk[:start])])
            assert abs(value - chance(walk[:start], 0.6)) < 3 * error < 0.1
    expected = [value_of(returns[0, tuple(walk[:start])])[0] for walk in (WON, LOST) for start in range(6)]
    is_near(forest.token["prefix_value"], expected, 1e-6)
    assert forest.token["step_index"].tolist() == [*range(6), *range(6)]
    assert set(forest.token["prefix_rollouts"].tolist()) == {400.0}


@pytest.mark.parametrize("adaptive", [0.0, 0.5])
def test_values_are_unbiased(adaptive):
    """Over 200 repetitions, where more rollouts are drawn by what the neighbours say, too."""
    found = []
    for seed in range(200):
        forest, _, _, _ = continue_from(
            drawn(0.6, seed), group(WON, LOST), EACH, given(num_rollouts=4, adaptive=adaptive)
        )
        found.append(torch.stack([forest.token["prefix_value"], forest.token["prefix_rollouts"]]))
    values, counts = torch.stack(found).unbind(1)
    exact = torch.tensor([chance(walk[:start], 0.6) for walk in (WON, LOST) for start in range(6)])
    error = values.std(0) / 200**0.5
    assert ((values.mean(0) - exact).abs() < 3.5 * error).all()
    assert set(counts.unique().tolist()) == ({4.0} if adaptive == 0 else {2.0, 4.0})


def test_errors_are_those_of_the_values():
    """The mean square of what is off is the mean square of the errors, a little less because they allow for few."""
    off, errors = [], []
    for seed in range(200):
        forest, _, _, _ = continue_from(drawn(0.6, seed), group(WON), EACH, given(num_rollouts=8))
        exact = torch.tensor([chance(WON[:start], 0.6) for start in range(6)])
        off.append((forest.token["prefix_value"] - exact).square().mean())
        errors.append(forest.token["prefix_error"].square().mean())
    assert 0.8 < float(torch.stack(off).mean() / torch.stack(errors).mean()) < 1.1


def test_a_policy_without_chance_is_known_exactly():
    forest, _, _, _ = continue_from(drawn(1.0), group(WON, [DOWN, UP, UP, UP]), EACH, given(num_rollouts=2))
    assert set(forest.token["prefix_value"].tolist()) == {1.0}
    assert run(forest, "vine").abs().max() == 0


def test_shared_prefixes_are_continued_once():
    rollouts = drawn(0.6)
    continue_from(rollouts, group(WON, LOST, WON), EACH, given(num_rollouts=3))
    prefixes = {(1, *walk[:start]) for walk in (WON, LOST) for start in range(6)}
    assert sorted(rollouts.sampler.asked) == sorted(prefixes)
    assert set(rollouts.sampler.asked[:2]) == {(1, *WON[:5]), (1, *LOST[:5])}  # the longest first
    assert rollouts.count.drawn == 3 * len(prefixes)
    assert rollouts.count.encoded == sum(map(len, prefixes))  # this sampler does not say that it keeps any


def test_neither_order_nor_processes_matter():
    """Values follow from the tokens, so a resumed run and one on two processes have the same."""
    forest = Forest.join([group(WON, LOST), group(LOST, [UP, UP], prompt=(2,))])
    turned = Forest.join([group([UP, UP], LOST, prompt=(2,)), group(LOST, WON)])
    one, two = (continue_from(drawn(0.6), each, EACH, given(num_rollouts=3))[3] for each in (forest, turned))
    assert {(1 - tree, tokens): list(row) for (tree, tokens), row in two.items()} == one
    parts = [drawn(0.6), drawn(0.6)]
    made = plan(steps_of(forest, EACH), 3)
    own = []
    for rank, part in enumerate(parts):
        part.ranks = Ranks(rank, 2)
        part.ranks.gather = lambda value: [value]
        own.append(measure(part, forest, made, given(num_rollouts=3)))
    assert not own[0].keys() & own[1].keys() and own[0] | own[1] == one


def test_another_iteration_draws_others():
    forest = group(WON, LOST)
    one, two = (
        continue_from(drawn(0.5), forest.with_tree(version=torch.tensor([v])), EACH, given(num_rollouts=9))[3]
        for v in (0, 1)
    )
    assert one.keys() == two.keys() and one != two


def test_the_error_is_that_of_the_returns_and_the_ends_of_their_range():
    assert value_of([1.0, 1.0, 0.0, 0.0]) == (0.5, 0.25)
    assert value_of([1.0]) == (1.0, pytest.approx((2 / 9) ** 0.5))
    assert value_of([-3.0, 3.0]) == (0.0, pytest.approx(3 / 2**0.5))


# ---------------------------------------------------------------------- what is not measured


def test_a_step_without_a_judged_continuation_joins_the_one_before():
    def strict(forest: Forest) -> Forest:
        """Judges nothing that goes on after two tokens."""
        judged = judge(forest)
        parent = judged.segment["parent"]
        after_two = (parent >= 0) & (judged.segment["length"][parent] == 2)
        return judged.with_segment(has_reward=judged.segment["has_reward"] & ~after_two)

    rollouts = replace(drawn(1.0), judge=strict)
    forest, steps, made, _ = continue_from(rollouts, group([DOWN, UP, UP, UP]), EACH, given(num_rollouts=2))
    assert steps[0].starts == (0, 1, 3) and made.steps[0].starts == (0, 1, 2, 3)
    assert forest.token["step_index"].tolist() == [0, 1, 1, 2]
    assert set(forest.token["prefix_value"].tolist()) == {1.0}
    metrics = prefix_value_metrics(forest, steps, made, rollouts.count)
    assert metrics["prefix/steps"] == 3 and metrics["prefix/unjudged"] == 0.25

    def never(forest: Forest) -> Forest:
        return forest

    forest, steps, _, _ = continue_from(replace(drawn(0.5), judge=never), group(WON, LOST), EACH, given(num_rollouts=2))
    assert steps[0].starts == (0,) and set(forest.token["prefix_value"].tolist()) == {0.5}  # the group's mean
    assert set(forest.token["prefix_rollouts"].tolist()) == {2.0}


def test_unjudged_completions_take_no_rollouts():
    forest = group(WON, LOST)
    forest = forest.with_segment(has_reward=torch.tensor([True, False]))
    rollouts = drawn(0.6)
    forest, _, _, _ = continue_from(rollouts, forest, EACH, given(num_rollouts=2))
    assert len(rollouts.sampler.asked) == 6 and forest.token["prefix_rollouts"].tolist() == [2.0] * 6 + [0.0] * 6


def test_the_group_may_stand_for_the_prompt():
    """The others' mean: a completion is not its own baseline. One that is alone has rollouts."""
    rollouts = drawn(0.6)
    forest = Forest.join([group(WON, LOST, LOST), group([UP, UP], prompt=(2,))])
    forest, _, _, _ = continue_from(rollouts, forest, EACH, given(num_rollouts=2, start="group"))
    first = forest.segment["start"]
    assert forest.token["prefix_value"][first][:3].tolist() == [0.0, 0.5, 0.5]
    assert (1,) not in rollouts.sampler.asked and (2,) in rollouts.sampler.asked


def test_tool_tokens_are_refused():
    segments = [Segment([UP], finish="cut"), Segment([9], 0, "cut", sampled=False), Segment([UP], 1, reward=1.0)]
    forest = Forest.from_trees([Tree(Problem(id="talk"), [1], segments)])
    with pytest.raises(UserError, match="tree 'talk', segment 1 was not sampled"):
        continue_from(drawn(0.6), forest, EACH, given())


def test_completions_longer_than_the_limit_are_refused():
    rollouts = replace(drawn(0.6), params=SamplingParams(max_new_tokens=3))
    with pytest.raises(UserError, match=r"'walk' has a step after 5 tokens, and sampler\.max_new_tokens is 3"):
        continue_from(rollouts, group(WON), EACH, given())


# ---------------------------------------------------------------------- a budget


def test_a_budget_takes_rollouts_first_and_steps_then():
    """A rollout of each of 6 steps of one completion takes 6 + 5 + ... + 1 = 21 tokens."""
    steps = steps_of(group(WON), EACH)
    assert plan(steps, 9) == Plan(steps, 9)
    assert plan(steps, 9, 21 * 9).num_rollouts == 9 and plan(steps, 9, 100).num_rollouts == 4
    thin = plan(steps, 9, 20)  # steps 0, 2, 4: 6 + 4 + 2
    assert (thin.num_rollouts, thin.every, thin.steps[0].starts) == (1, 2, (0, 2, 4))
    assert plan(steps, 9, 6).steps[0].starts == (0,)
    with pytest.raises(UserError, match=r"5 tokens are fewer than one rollout of each prompt takes \(about 6\)"):
        plan(steps, 9, 5)


def test_max_steps_leaves_the_rest_to_the_last():
    assert steps_of(group(WON), EACH, 3)[0].starts == (0, 1, 2)
    assert steps_of(group(WON), EACH, 1)[0].starts == (0,)
    assert steps_of(group(WON), StepRule(tokens=4))[0].starts == (0, 4)


# ---------------------------------------------------------------------- credit


def test_vine_by_hand():
    """Three steps of 1, 2 and 1 tokens with V = 1/2, 3/4, 1/4 before them, and a right end."""
    columns = {"prefix_value": [[[0.5, 0.75, 0.75, 0.25]]], "step_index": [[[0, 1, 1, 2]]]}
    is_near(run(flat_forest([[4]], [[1.0]], **columns), "vine"), [0.25, -0.5, -0.5, 0.75], 0)
    dense = flat_forest([[4]], [[1.0]], token_rewards=[[[0.0, 0.125, 0.25, 0.0]]], **columns)
    is_near(run(dense, "vine"), [0.25, -0.125, -0.125, 0.75], 0)
    white = run(flat_forest([[4]], [[1.0]], **columns), "vine", whitening=True)
    assert abs(float(white.mean())) < 1e-6 and float(white.std()) == pytest.approx(1, abs=1e-4)


def test_equal_values_of_two_steps_are_no_end_of_one():
    """0 for the first of two steps with one value; the rewards inside them stay apart."""
    columns = {"prefix_value": [[[0.5, 0.5]]], "step_index": [[[0, 1]]]}
    is_near(run(flat_forest([[2]], [[1.0]], **columns), "vine"), [0.0, 0.5], 0)


def test_completions_of_one_step_get_what_they_are_above_the_prompt():
    forest, _, _, returns = continue_from(drawn(0.6), group(WON, LOST), StepRule(tokens=99), given(num_rollouts=5))
    value = value_of(returns[0, ()])[0]
    is_near(run(forest, "vine"), [1 - value] * 6 + [-value] * 6, 1e-6)


def test_steps_sum_to_what_a_completion_is_above_the_prompt():
    forest, steps, _, _ = continue_from(drawn(0.6), group(WON, LOST), EACH, given(num_rollouts=5))
    advantages = run(forest, "vine")
    for each in steps:
        value = float(forest.token["prefix_value"][each.rows[0]])
        assert float(advantages[each.rows].sum()) == pytest.approx(each.total - value, abs=1e-5)


def test_the_best_of_several_rollouts_is_a_prover():
    """1 - (1 - V)^K of V = 1/2, 3/4, 1/4 with K 2: 3/4, 15/16, 7/16; the outcomes stay 1 and 0."""
    columns = {"prefix_value": [[[0.5, 0.75, 0.25]] * 2], "step_index": [[[0, 1, 2]] * 2]}
    forest = flat_forest([[3, 3]], [[1.0, 0.0]], **columns)
    is_near(run(forest, "vine", best_of=2), [3 / 16, -0.5, 9 / 16, 3 / 16, -0.5, -7 / 16], 1e-6)
    with pytest.raises(UserError, match="best_of 2 is the chance that one of so many rollouts is right"):
        run(flat_forest([[3]], [[2.0]], **{name: [each[0][:1]] for name, each in columns.items()}), "vine", best_of=2)


def test_progress_as_a_reward_telescopes_and_as_an_advantage_does_not():
    """PAV's trap: alpha times the progress, fed as rewards and summed to the end, is alpha (r - V(prompt)) for
    the first token of a completion; added as an advantage it differs from step to step."""
    columns = {"prefix_value": [[[0.5, 0.75, 0.25], [0.5, 0.5, 0.125]]], "step_index": [[[0, 1, 2]] * 2]}
    forest = flat_forest([[3, 3]], [[1.0, 0.0]], **columns)
    progress = run(forest, "vine")
    rewards = forest.with_token(token_rewards=3 * progress)
    fed = run(rewards, "reward_to_go", baseline="none")
    is_near(fed[[0, 3]], [1 + 3 * 0.5, 3 * -0.5], 1e-6)  # the first token of each: (1 + alpha) r - alpha V(prompt)
    added = run(forest, "rloo") + 3 * progress
    assert len(set(added[:3].tolist())) == 3 and float(progress[:3].sum()) == pytest.approx(0.5)


@pytest.mark.parametrize("returns", [[1.0, 0.0, 0.0], [1.0, 1.0], [0.25, -1.0, 3.0]], ids=str)
def test_soft_values_go_from_the_mean_to_the_largest(returns):
    """ER-PRM's labels; of rewards of 0 and 1 log(1 + p (e^eta - 1)) / eta; the error goes to that of the mean."""
    mean, error = value_of(returns)
    assert value_of(returns, 1e-6) == (pytest.approx(mean, abs=1e-5), pytest.approx(error, rel=1e-4))
    assert value_of(returns, 500.0)[0] == pytest.approx(max(returns), abs=0.01)
    assert value_of([1.0, 0.0, 0.0, 0.0], 2.0)[0] == pytest.approx(np.log(1 + 0.25 * (np.e**2 - 1)) / 2)
    values = [value_of(returns, eta)[0] for eta in (0.0, 0.5, 1.0, 4.0)]
    assert values == sorted(values)


def test_soft_values_are_those_of_the_rollouts():
    hard, _, _, returns = continue_from(drawn(0.6), group(WON, LOST), EACH, given(num_rollouts=5))
    soft, steps, _, _ = continue_from(drawn(0.6), group(WON, LOST), EACH, given(num_rollouts=5, eta=2.0))
    for each in steps:
        for start, row in zip(each.starts, each.rows, strict=True):
            own = returns[each.tree, each.token_ids[:start]]
            assert float(soft.token["prefix_value"][row]) == pytest.approx(value_of(own, 2.0)[0], abs=1e-6)
    assert not soft.token["prefix_value"].equal(hard.token["prefix_value"])


# ---------------------------------------------------------------------- the embedded model


@pytest.fixture(scope="module")
def sampled():
    """Groups of the embedded model, and what samples and judges them."""
    config = resolve({"algorithm": "vine"})
    rollouts = build_rollouts(config, build_parts(config), load_policy("embedded", "cpu"))
    forest = rollouts.grow(rollouts.sampler, rollouts.task.draw(0, 4), rollouts.encode, rollouts.params, range(4))
    return rollouts, rollouts.judge(forest)


def real(rollouts, seed: int = 0) -> Rollouts:
    rollouts.sampler.sync(rollouts.sampler.policy)  # forgets what other tests have left
    return Rollouts(rollouts.sampler, rollouts.params, rollouts.judge, seed)


def test_prefixes_are_computed_once_for_a_completion(sampled):
    """Beside the rollouts at most 15% more, and the same rollouts as where nothing is kept."""
    parts, forest = sampled
    rule = StepRule(delimiters=frozenset(parts.encode.tokenizer.convert_tokens_to_ids(["."])))
    kept = real(parts)
    _, steps, made, with_cache = continue_from(kept, forest, rule, given(num_rollouts=9))
    longest = {(each.tree, each.token_ids[: each.starts[-1]]) for each in steps}
    prompts = forest.tree["prompt_length"]
    once = sum(int(prompts[tree]) + len(tokens) for tree, tokens in longest)
    prefixes = {prefix for each in made.steps for prefix in each.prefixes}
    assert kept.count.encoded <= once + len(prefixes)  # the last token of each shorter one gives its logits
    assert kept.count.overhead <= 1.15
    parts.sampler.prefix_cache.max_bytes, before = 0, parts.sampler.prefix_cache.max_bytes
    try:
        none = real(parts)
        without = continue_from(none, forest, rule, given(num_rollouts=9))[3]
    finally:
        parts.sampler.prefix_cache.max_bytes = before
    assert none.count.encoded == sum(int(prompts[tree]) + len(tokens) for tree, tokens in prefixes)
    assert without == with_cache


def test_records_keep_them(sampled, tmp_path):
    parts, forest = sampled
    forest, _, _, _ = continue_from(real(parts), forest, StepRule(tokens=8), given(num_rollouts=2))
    write_trees(tmp_path / "a.jsonl.zst", forest)
    again = Forest.from_trees(list(read_trees(str(tmp_path / "a.jsonl.zst"))))
    assert all(again.token[name].equal(forest.token[name]) for name in COLUMNS)
    out = tmp_path / "b.jsonl"
    assert main(["credit", "--in", str(tmp_path / "a.jsonl.zst"), "--out", str(out), "--credit.name", "vine"]) == 0
    written = [s["advantages"] for line in out.read_text().splitlines() for s in json.loads(line)["segments"]]
    is_near(run(forest, "vine"), [value for row in written for value in row], 1e-5)


SMALL = ["--train.problems-per-iteration", "3", "--group-size", "3", "--max-new-tokens", "48", "--num-problems", "0"]
SMALL += ["--prefix-values.num-rollouts", "3", "--optim.schedule", "constant", "--device", "cpu"]


def train(run_dir, *words) -> None:
    assert main(["train", "--algorithm", "vine", *SMALL, "--run-dir", str(run_dir), *words]) in (0, 1)


def rows(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    train(tmp_path / "one", "--iterations", "3")
    train(tmp_path / "two", "--iterations", "2")
    assert main(["train", "--resume", str(tmp_path / "two"), "--iterations", "3"]) in (0, 1)
    one, two = (load_file(tmp_path / name / "checkpoints" / "000003" / "model.safetensors") for name in ("one", "two"))
    assert all(one[name].equal(two[name]) for name in one)
    last, again = rows(tmp_path / "one")[-1], rows(tmp_path / "two")[-1]
    assert last["tokens/rollouts"] > 0 and last["prefix/overhead"] < 1.5
    assert all(last[name] == again[name] for name in last if not name.startswith(("time/", "tokens/per")))


def test_rollouts_count_as_sampled(tmp_path):
    """And a prover, the embedded model itself, takes as many; all options at once."""
    words = ["--prefix-values.adaptive", "0.4", "--prefix-values.max-steps", "3", "--prefix-values.start", "group"]
    train(tmp_path / "run", "--iterations", "1", "--prefix-values.model", "embedded", *words)
    (_, row) = rows(tmp_path / "run")
    own = row["completion/length"] * 9
    assert row["tokens/sampled"] == pytest.approx(own + row["tokens/rollouts"]) == row["tokens/total"]
    assert 1 < row["prefix/steps"] <= 3 and row["prefix/rollouts"] == 3


def test_what_does_not_fit_is_said(tmp_path, capsys):
    words = ["train", "--algorithm", "vine", *SMALL, "--run-dir", str(tmp_path / "run")]
    for option, value, message in (
        ("step.delimiters", "[xyzzy]", "prefix_values.step.delimiters: no token"),
        ("step", "{tokens: null, delimiters: []}", "prefix_values.step: give tokens"),
        ("num-rollouts", "0", "prefix_values.num_rollouts"),
        ("model", "nowhere", "prefix_values.model: 'nowhere'"),
        ("max-tokens", "5", "prefix_values.max_tokens: 5 tokens are fewer"),
    ):
        assert main([*words, f"--prefix-values.{option}", value, "--iterations", "1"]) == 2
        assert message in capsys.readouterr().err

"""Sampling in windows: what is drawn, what is carried on and trained on, what a checkpoint keeps, what is refused."""

import copy
import json
import os
import shutil
import signal
from itertools import chain

import pytest
import torch
from rich.console import Console
from test_critic import caught_gradient, critic, same, weights, with_weights
from test_train import difference, metrics, train
from tiny_models import fresh

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.credit import CREDIT, assign, needs_of
from stepcredit.credit.gae import Returns
from stepcredit.errors import UserError
from stepcredit.estimators.frozen import OldPolicy
from stepcredit.estimators.reads import observers_of
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.growth.flat import flat
from stepcredit.growth.window import (
    Carried,
    from_state,
    sample_window,
    to_state,
    whole_tree,
    window_tree,
    with_past,
)
from stepcredit.policy.forward import score
from stepcredit.policy.loading import load_policy
from stepcredit.run.build import build_parts
from stepcredit.run.source import Position
from stepcredit.run.state import load_state, save_state
from stepcredit.run.trainer import Trainer
from stepcredit.run.work import Work
from stepcredit.samplers.params import SamplingParams, Stream
from stepcredit.samplers.transformers import TransformersSampler

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [3, 4]]
SEEDS = [12, 23, 34, 45]
PARAMS = SamplingParams(max_new_tokens=16, stop_token_ids=tuple(range(6)))
close = torch.testing.assert_close


def groups(group_size: int = 3) -> list[Carried]:
    return [
        Carried.begin(Problem(id=f"p{number}"), prompt, number, number, group_size)
        for number, prompt in enumerate(PROMPTS)
    ]


def to_the_end(sampler: TransformersSampler, carried: list[Carried], window: int) -> tuple[list[Carried], int]:
    """The groups when all have ended, and how many windows that took."""
    for version in range(99):
        if not any(group.open for group in carried):
            return carried, version
        carried = sample_window(sampler, carried, PARAMS, SEEDS, window, version)
    raise AssertionError("they do not end")


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize("form", ["growing", "paged", "cached"])
@pytest.mark.parametrize("window, family", [(1, "qwen2"), (5, "qwen3"), (7, "llama"), (99, "qwen3"), (4, "gemma3")])
def test_the_window_does_not_change_what_is_drawn(family, window, form):
    """With the same weights: the tokens, ends and log-probabilities of groups that are sampled at once."""
    policy = fresh(family)
    policy.scoring_form = "cached" if form == "cached" else policy.scoring_form
    sampler = TransformersSampler(policy, 6, paged=form == "paged")
    prompts = dict(zip([f"p{number}" for number in range(4)], PROMPTS, strict=True))
    problems = [Problem(id=name) for name in prompts]
    whole = flat(sampler, problems, lambda problem: prompts[problem.id], PARAMS, SEEDS, 3)
    ended, windows = to_the_end(sampler, groups(), window)
    lengths = [len(one.token_ids) for group in ended for one in group.tree.segments]
    assert windows == -(-max(lengths) // window) and len(set(lengths)) > 2
    found = Forest.from_trees([whole_tree(group, windows - 1) for group in ended])
    assert found.token["token_ids"].equal(whole.token["token_ids"])
    assert found.segment["finish"].equal(whole.segment["finish"])
    close(found.token["rollout_logprobs"], whole.token["rollout_logprobs"], atol=1e-4, rtol=0)
    position = found.token["position"]
    assert found.token["age"].equal((windows - 1 - position // window).float())


def test_streams_are_of_single_completions():
    sampler = TransformersSampler(fresh("qwen2"))
    with pytest.raises(ValueError, match="n is 2"):
        sampler.sample([[5]], 2, PARAMS, [1], streams=[Stream(0, 2)])


def test_tokens_keep_the_version_and_log_probability_that_they_were_sampled_with():
    """Other weights in between: the tokens before stay, and each log-probability is that of its own weights."""
    one, two = fresh("qwen3"), fresh("qwen3", seed=1)
    first = sample_window(TransformersSampler(one), groups(), PARAMS, SEEDS, 4, version=3)
    after = sample_window(TransformersSampler(two), first, PARAMS, SEEDS, 99, version=5)
    assert not any(group.open for group in after)
    for before, group in zip(first, after, strict=True):
        for old, new in zip(before.tree.segments, group.tree.segments, strict=True):
            assert new.token_ids[: len(old.token_ids)] == old.token_ids
            assert new.columns["rollout_logprobs"][: len(old.token_ids)] == old.columns["rollout_logprobs"]
    forest = Forest.from_trees([whole_tree(group, 6) for group in after])
    age = forest.token["age"]
    assert age.unique().tolist() == [1.0, 3.0]
    for policy, old in ((one, 3.0), (two, 1.0)):
        own = score(policy, forest, 1.0, 1 << 14).logprobs
        close(forest.token["rollout_logprobs"][age == old], own[age == old], atol=1e-4, rtol=0)
        assert (forest.token["rollout_logprobs"] - own)[age != old].abs().max() > 0.1
    assert forest.fresh.sum() == 0 and Forest.from_trees([whole_tree(after[0], 5)]).fresh.any()


def test_a_checkpoint_keeps_what_is_carried(tmp_path):
    carried = sample_window(TransformersSampler(fresh("qwen3")), groups(), PARAMS, SEEDS, 4, version=7)
    save_state({"carried": to_state(carried)}, tmp_path / "state")
    back = from_state(load_state(tmp_path / "state")["carried"])
    for one, two in zip(carried, back, strict=True):
        assert (one.number, one.place, one.open) == (two.number, two.place, two.open)
        assert [vars(segment) for segment in one.tree.segments] == [vars(segment) for segment in two.tree.segments]
        assert one.tree.prompt_ids == two.tree.prompt_ids
    assert "carried" not in Position(3, 3).state_dict()


# ---------------------------------------------------------------------- credit


def in_windows(
    values: list[float], count: int, reward: float | None = None, finish: str = "open", **columns: list[float]
) -> Forest:
    """One completion whose last `count` tokens are new."""
    given = {"values": values, "rollout_logprobs": [0.0] * len(values), "version": [0.0] * len(values), **columns}
    tree = Tree(Problem(id="p"), [1], [Segment([5] * len(values), finish=finish, columns=given)])
    made = window_tree(Carried(tree, 0, 0, (count,)), 0)
    made.segments[-1].reward = reward
    return with_past(Forest.from_trees([made]))


@pytest.mark.parametrize("lam, expected", [(0.0, [0.25, 0.5, 0.0]), (1.0, [0.75, 0.5, 0.0]), (0.5, [0.5, 0.5, 0.0])])
def test_advantages_of_a_completion_that_goes_on_by_hand(lam, expected):
    """EGAE: values 1/8, 1/4, 1/2, 1; the value of the last state stands behind it, so the last advantage is 0."""
    forest = in_windows([0.125, 0.25, 0.5, 1.0], 3)
    found = assign(forest, "gae", CREDIT["gae"], {"lam": lam, "bootstrap": "hold_last"}).token["advantages"]
    close(found[1:], torch.tensor(expected))
    assert forest.active.tolist() == [False, True, True, True] and forest.usable.all()
    assert not forest.judged.any() and forest.open.tolist() == [False, True]


def test_to_take_a_cut_for_an_end_would_punish_the_last_token():
    """What `sampler.window` refuses: bootstrap zero gives it -V."""
    found = assign(in_windows([0.5, 0.25], 2), "gae", CREDIT["gae"], {"lam": 1.0}).token["advantages"]
    close(found, torch.tensor([-0.5, -0.25]))


def test_bootstrap_by_the_state_behind():
    forest = in_windows([0.5, 0.25], 2, value_after=[0.0, 1.0])
    found = assign(forest, "gae", CREDIT["gae"], {"lam": 0.0, "bootstrap": "value"}).token["advantages"]
    close(found, torch.tensor([-0.25, 0.75]))


@pytest.mark.parametrize("count", [1, 3, 4])
def test_an_ended_completion_has_the_credit_of_one_that_was_sampled_at_once(count):
    values = [0.125, 0.25, 0.5, 1.0]
    found = assign(in_windows(values, count, 1.0, "stop"), "gae", CREDIT["gae"], {"lam": 0.5}).token["advantages"]
    whole = Forest.from_trees([Tree(Problem(), [1], [Segment([5] * 4, reward=1.0, columns={"values": values})])])
    close(found, assign(whole, "gae", CREDIT["gae"], {"lam": 0.5}).token["advantages"])


def test_new_tokens_alone_are_whitened():
    forest = in_windows([9.0, 9.0, 0.25, 0.5, 1.0], 3)
    found = assign(forest, "gae", CREDIT["gae"], {"whiten": True, "bootstrap": "hold_last"}).token["advantages"]
    assert found[:2].abs().max() == 0
    close(found[2:].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    close(found[2:].std(), torch.tensor(1.0))


def test_only_credit_that_takes_unfinished_completions_says_so():
    assert [name for name, function in CREDIT.items() if needs_of(function).unfinished] == ["gae"]
    mixed = resolve({"credit": {"sum": ["gae", "grpo"]}})
    assert not needs_of(build_parts(mixed).credit).unfinished
    assert needs_of(build_parts(resolve({"credit": {"sum": ["gae", {"name": "gae", "lam": 1.0}]}})).credit).unfinished


# ---------------------------------------------------------------------- what learns


def two_kinds() -> tuple[Forest, Forest]:
    """Groups after two windows, those that ended with rewards; and the ended completions alone, each whole."""
    sampler = TransformersSampler(fresh("qwen3"))
    carried = sample_window(sampler, groups(), PARAMS, SEEDS, 3, 0)
    going = [(group, seed) for group, seed in zip(carried, SEEDS, strict=True) if group.open]
    carried = sample_window(sampler, [group for group, _ in going], PARAMS, [seed for _, seed in going], 5, 1)
    trees, whole = [], []
    for group in carried:
        made = window_tree(group, 1)
        new = [one for one, count in zip(group.tree.segments, group.drawn, strict=True) if count]
        leaves = [segment for segment in made.segments if segment.finish != "cut"]
        ended = []
        for number, (segment, one) in enumerate(zip(leaves, new, strict=True)):
            if segment.finish == "stop":
                segment.reward = number / 2
                columns = {name: one.columns[name] for name in ("rollout_logprobs", "entropy")}
                ended.append(Segment(one.token_ids, reward=number / 2, columns=columns))
        trees.append(made)
        if ended:
            whole.append(Tree(group.tree.problem, group.tree.prompt_ids, ended))
    forest = with_past(Forest.from_trees(trees))
    assert forest.open.any() and whole
    return forest, Forest.from_trees(whole)


def test_the_critic_learns_from_ended_completions_and_all_their_tokens(monkeypatch):
    """Its gradient is that of the ended ones alone, each in one piece."""
    forest, whole = two_kinds()
    returns = Returns(1.0, 1.0, "hold_last")
    models = [with_weights(critic(returns, learn_from="finished")) for _ in range(2)]
    found, expected = (
        caught_gradient(model, each, monkeypatch) for model, each in zip(models, (forest, whole), strict=True)
    )
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-3
    for one, two in zip(found, expected, strict=True):
        close(one, two, atol=1e-6, rtol=1e-4)
    share = models[0].metrics["critic/learnt_from"]
    assert share == pytest.approx(whole.num_tokens / forest.num_tokens) and 0 < share < 1


def test_where_nothing_has_ended_the_critic_learns_nothing():
    sampler = TransformersSampler(fresh("qwen3"))
    carried = sample_window(sampler, groups(), PARAMS, SEEDS, 1, 0)
    going = [
        Carried(Tree(g.tree.problem, g.tree.prompt_ids, [g.tree.segments[i] for i in g.open]), 0, 0) for g in carried
    ]
    trees = [window_tree(Carried(g.tree, 0, 0, (1,) * len(g.tree.segments)), 0) for g in going if g.tree.segments]
    forest = with_past(Forest.from_trees(trees))
    model = with_weights(critic(Returns(1.0, 1.0, "hold_last"), learn_from="finished"))
    before = weights(model)
    seen = model.observe(forest)
    assert all(one.equal(two) for one, two in zip(before, weights(model), strict=True))
    assert model.metrics["critic/learnt_from"] == 0 and "critic/explained_variance" not in model.metrics
    close(seen.token["value_target"], seen.token["values"])  # of one token each, at gamma 1


def test_a_critic_that_learns_from_all_learns_from_new_tokens():
    """Tokens of earlier windows are in no loss: masks of their segments change nothing."""
    forest, _ = two_kinds()
    one, two = (with_weights(critic(Returns(1.0, 1.0, "hold_last"))) for _ in range(2))
    one.observe(forest)
    two.observe(forest.with_segment(mask=~forest.segment["past"]))
    assert same(one, two) and not same(one, with_weights(critic()))


def test_old_log_probabilities_are_of_what_sampled_a_token():
    """Where the loss's ratio is to correct it; with importance weights they are the present policy's."""
    policy = fresh("qwen3")
    first = sample_window(TransformersSampler(fresh("qwen3", seed=1)), groups(), PARAMS, SEEDS, 4, 0)
    after = sample_window(TransformersSampler(policy), first, PARAMS, SEEDS, 99, 1)
    forest = Forest.from_trees([whole_tree(group, 1) for group in after])
    stale, own = forest.token["age"] > 0, score(policy, forest, 1.0, 1 << 14).logprobs
    assert stale.any() and not stale.all()
    found = OldPolicy(policy, 1.0, 1 << 14).observe(forest).token["old_logprobs"]
    assert found[stale].equal(forest.token["rollout_logprobs"][stale])
    close(found[~stale], own[~stale])
    corrected = OldPolicy(policy, 1.0, 1 << 14, as_sampled=False).observe(forest).token["old_logprobs"]
    close(corrected, own)
    auto = OldPolicy(policy, 1.0, 1 << 14, "auto")
    for _ in range(2):
        taken = auto.observe(forest).token["old_logprobs"]
    assert auto.source == "auto" and taken.equal(forest.token["rollout_logprobs"])  # tokens of its own weights agree


def test_groups_of_several_versions_need_old_log_probabilities():
    for window, credit, needed in ((0, "grpo", False), (8, "grpo", True), (8, "gae", False)):
        options = {"bootstrap": "hold_last"} if credit == "gae" else {}
        config = resolve({"credit": {"name": credit, **options}, "sampler": {"window": window}})
        assert ("old_logprobs" in observers_of(config).needed) == needed


# ---------------------------------------------------------------------- the source


def trainer(**given) -> Trainer:
    base = {
        "train": {"problems_per_iteration": 3, "device": "cpu"},
        "growth": {"group_size": 4},
        "eval": {"num_problems": 0},
        "sampler": {"max_new_tokens": 48},
    }
    for section, options in given.items():
        base[section] = base.get(section, {}) | options if isinstance(options, dict) else options
    config = resolve(base)
    return Trainer(config, build_parts(config), load_policy("embedded", "cpu"), Console(quiet=True))


def ended_completions(made: Trainer, iterations: int) -> dict[tuple[str, tuple[int, ...]], float | None]:
    """Problem and tokens of all completions that ended, with their rewards."""
    seen = {}
    for _ in range(iterations):
        batch = made.source.next()
        made.source.position = batch.position
        forest = batch.forest
        for leaf in (forest.segment["is_leaf"] & ~forest.open).nonzero().squeeze(1).tolist():
            path = forest.completion_segments(leaf)
            starts, lengths = forest.segment["start"], forest.segment["length"]
            tokens = [forest.token["token_ids"][starts[one] : starts[one] + lengths[one]].tolist() for one in path]
            name = forest.problems[int(forest.segment["tree"][leaf])].id
            assert bool(forest.segment["has_reward"][leaf])
            seen[name, tuple(chain.from_iterable(tokens))] = float(forest.segment["reward"][leaf])
    return seen


@pytest.mark.parametrize("algorithm", ["grpo", "t_ppo"])
def test_with_weights_that_stay_the_completions_are_those_of_no_window(algorithm):
    """And so are their rewards: nothing is lost, nothing is judged twice or too early."""
    windowed = trainer(algorithm=algorithm, sampler={"max_new_tokens": 48, "window": 10})
    found = ended_completions(windowed, 8)
    assert len(found) > 12
    expected = ended_completions(trainer(algorithm="grpo"), 12)
    assert found.items() <= expected.items()
    going = {group.tree.problem.id for group in windowed.source.position.carried}
    begun = [f"train-0-{number}" for number in range(windowed.source.position.drawn)]
    missing = {name for name, _ in expected if name in begun} - {name for name, _ in found}
    assert missing <= going


@pytest.mark.parametrize("algorithm", ["grpo", "t_ppo"])
def test_as_many_rows_are_sampled_in_each_iteration(algorithm):
    made = trainer(algorithm=algorithm, sampler={"max_new_tokens": 48, "window": 10})
    ages = []
    for iteration in range(6):
        batch = made.source.next()
        made.source.position = batch.position
        numbers = batch.metrics
        assert 12 - 3 <= numbers["window/rows"] / numbers["window/rounds"] <= 12
        assert numbers["tokens/sampled"] <= 10 * numbers["window/rows"]
        going = sum(len(group.open) for group in batch.position.carried)
        assert numbers["window/carried"] == going
        if algorithm == "grpo":
            assert not batch.forest.open.any() and "past" not in batch.forest.segment
            assert batch.forest.segment["has_reward"].all()
        else:
            assert numbers["window/rounds"] == 1 and numbers["window/stale"] == 0
            assert int((~batch.forest.past).sum()) == numbers["tokens/sampled"]
            assert int(batch.forest.open.sum()) == going
        assert batch.forest.tree["place"].tolist() == sorted(batch.forest.tree["place"].tolist())
        ages.append(numbers["window/age_max"])
        made.source.sync(made.policy, iteration + 1)
    assert max(ages) >= 1


def test_a_window_that_no_completion_outgrows_changes_nothing():
    one, two = (trainer(algorithm="t_ppo", sampler={"max_new_tokens": 48, "window": size}) for size in (0, 48))
    first, second = one.begin(), two.begin()
    assert first.forest.token["token_ids"].equal(second.forest.token["token_ids"])
    for name in ("advantages", "values", "value_target"):
        close(first.forest.token[name], second.forest.token[name], atol=1e-4, rtol=1e-3)
    assert second.position.carried == () and second.observed["window/finished"] == 12
    assert first.forest.active.equal(second.forest.active)


def test_problems_that_have_changed_are_left_out_and_counted(caplog):
    made = trainer(algorithm="t_ppo", sampler={"max_new_tokens": 48, "window": 6})
    position = made.source.next().position
    state = copy.deepcopy(position.state_dict())
    state["carried"]["prompt_ids"][0] += 1
    made.source.position, made.source._known = Position.from_state(state), set()
    batch = made.source.next()
    assert batch.metrics["window/lost"] == len(position.carried[0].open) > 0
    assert "another prompt" in caplog.text
    made.source.position, made.source._known = Position.from_state(position.state_dict()), set()
    assert made.source.next().metrics["window/lost"] == 0


# ---------------------------------------------------------------------- runs

WINDOWS = {"max_new_tokens": 40, "sampler__window": 10, "optim__schedule": "constant"}
RUNS = {
    "t_ppo": {"critic__num_minibatches": 2, "optim__num_minibatches": 2},
    "grpo": {"optim__num_minibatches": 2},
}


def straight_on(folder, algorithm: str, **more) -> dict:
    options = {"algorithm": algorithm, "iterations": 5, "save_every": 2, "checkpoint__keep": 9} | WINDOWS
    options |= RUNS[algorithm] | more
    assert train(folder, **options) in (0, 1)
    return options


def same_run(one, two) -> None:
    assert difference(one, two, 5) == 0.0
    left = ("time/", "tokens/per_second")
    rows = [
        [{name: value for name, value in row.items() if not name.startswith(left)} for row in metrics(run)]
        for run in (one, two)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("algorithm", RUNS)
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, algorithm):
    """After iteration 2, with completions carried: weights, metrics and what is carried end the same."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight_on(straight, algorithm)
    carried = json.loads((straight / "checkpoints" / "000002" / "trainer_state" / "state.json").read_text())
    assert carried["position"]["carried"]["problems"]
    shutil.copytree(straight, killed)
    for name in ("000004", "000005"):
        shutil.rmtree(killed / "checkpoints" / name)
    (killed / "latest").write_text("checkpoints/000002\n")
    assert main(["train", "--resume", "auto", "--run-dir", str(killed)]) in (0, 1)
    same_run(straight, killed)
    ends = [(run / "checkpoints" / "000005" / "trainer_state" / "state.json").read_text() for run in (straight, killed)]
    assert json.loads(ends[0])["position"] == json.loads(ends[1])["position"]
    assert any(row["window/age_max"] > 0 for row in metrics(straight)[1:])


def test_a_run_that_is_stopped_between_steps_goes_on_bit_for_bit(tmp_path, monkeypatch):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    options = straight_on(straight, "t_ppo")
    update, calls = Trainer.update, []

    def signalled(self, work: Work, *given):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, work, *given)

    monkeypatch.setattr(Trainer, "update", signalled)
    assert train(stopped, **options) == 130
    assert list((stopped / "checkpoints").glob("*.*"))
    monkeypatch.setattr(Trainer, "update", update)
    assert main(["train", "--resume", "auto", "--run-dir", str(stopped)]) in (0, 1)
    same_run(straight, stopped)


def test_a_run_that_goes_on_without_a_window_says_what_it_leaves_out(tmp_path, caplog):
    run = tmp_path / "run"
    straight_on(run, "t_ppo", iterations=2)
    assert main(["train", "--resume", str(run), "--iterations", "3", "--sampler.window", "0"]) in (0, 1)
    assert "completions had not ended" in caplog.text
    assert "window/rows" not in metrics(run)[-1]


@pytest.mark.parametrize(
    "given, pieces",
    [
        ({"algorithm": "treerpo"}, ["growth.name is tree"]),
        ({"algorithm": "dapo", "filter": {"enabled": True}}, ["--filter.enabled false"]),
        ({"algorithm": "opo"}, ["loss 'reinforce'", "--objective.importance token"]),
        ({"algorithm": "ppo"}, ["credit.bootstrap zero", "hold_last"]),
        ({"credit": {"sum": ["gae"]}}, ["credit.sum[0].bootstrap zero"]),
        ({"sampler": {"name": "vllm", "server": {"urls": ["http://x"]}}}, ["'vllm'", "--sampler.name transformers"]),
        ({"sampler": {"name": "user_samplers.undeclared"}}, ["'user_samplers.undeclared'", "sampler.window 8"]),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(given, pieces):
    config = resolve(given | {"sampler": given.get("sampler", {}) | {"window": 8}})
    with pytest.raises(UserError) as error:
        build_parts(config)
    assert [piece for piece in ["sampler.window 8", *pieces] if piece not in str(error.value)] == [], error.value
    build_parts(resolve({"algorithm": "opo", "objective": {"importance": "token"}, "sampler": {"window": 8}}))

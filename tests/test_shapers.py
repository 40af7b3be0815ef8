"""Shapers by pencil, their options and order, their state, and what is said when one does not fit."""

import json
import logging
from pathlib import Path
from random import Random

import pytest
import torch
from builders import flat_forest, is_near, random_trees

from stepcredit.cli.arguments import parse
from stepcredit.cli.main import main
from stepcredit.config import dump_yaml, read_yaml, resolve
from stepcredit.errors import UserError
from stepcredit.estimators.base import Estimator
from stepcredit.estimators.table import observers
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.run.build import build_parts
from stepcredit.run.observing import observe, restored_states, shaper_state
from stepcredit.shaping.base import Shaped, Shaper, fresh_states, shaper
from stepcredit.shaping.choose import build_shapers, warn_of_raw_values, with_raw_rewards
from stepcredit.shaping.rewards import ranks
from stepcredit.shaping.shapers import SHAPERS


def shaped(name: str, forest: Forest, **options) -> Forest:
    return Shaper(name, SHAPERS[name], options)(with_raw_rewards(forest)).forest


def rewards(forest: Forest) -> list[float]:
    return forest.segment["reward"].tolist()


def scored(values: list[list[float | None]], thought: list[list[float]] | None = None, lengths=None) -> Forest:
    """Groups of completions with a reward `right` and, if given, one of the thinking."""
    trees = []
    for number, group in enumerate(values):
        segments = []
        for place, value in enumerate(group):
            parts = {"right": value, "thought": thought[number][place]} if thought else {"right": value}
            size = lengths[number][place] if lengths else 2
            segments.append(Segment([3] * size, reward=value, rewards=parts))
        trees.append(Tree(Problem(id=str(number)), [1], segments))
    return Forest.from_trees(trees)


# ---------------------------------------------------------------------- by pencil


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_only_positives_are_kept_in_either_range(low):
    forest = shaped("positives_only", scored([[1.0, low], [low, low], [1.0, None]]))
    assert forest.segment["mask"].tolist() == [True, False, False, False, True, False]
    assert rewards(forest) == [1, low, low, low, 1, 0]


def test_above_is_a_bound():
    forest = shaped("positives_only", scored([[1.0, 0.5, 0.6]]), above=0.5)
    assert forest.segment["mask"].tolist() == [True, False, True]


def test_a_shared_segment_stays_with_one_of_its_completions():
    segments = [
        Segment([1], finish="cut"),
        Segment([2], 0, reward=1.0),
        Segment([3], 0, reward=0.0),
        Segment([4], finish="cut"),
        Segment([5], 3, reward=0.0),
    ]
    forest = shaped("positives_only", Forest.from_trees([Tree(Problem(), [1], segments)]))
    assert forest.segment["mask"].tolist() == [True, True, False, False, False]


def test_uniform_by_raw_or_by_shaped_rewards():
    """A gate tells apart what is all right; a rank does so only for what is to be dropped first."""
    forest = scored([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]], [[0.5, 0.25], [0.5, 0.5], [1.0, 0.0]])
    gated = shaped("outcome_gate", forest, outcome="right", think="thought")
    assert rewards(gated) == [1.5, 1.25, 1.5, 0, 0, 0]
    given = Shaper("drop_uniform", SHAPERS["drop_uniform"])
    assert given(gated).forest.segment["mask"].tolist() == [True] * 4 + [False] * 2
    raw = Shaper("drop_uniform", SHAPERS["drop_uniform"], {"rewards": "raw"})
    assert raw(gated).forest.segment["mask"].tolist() == [False] * 2 + [True] * 2 + [False] * 2


def test_uniform_groups_may_stay_in_the_denominators():
    forest = shaped("drop_uniform", scored([[1.0, 1.0], [1.0, -1.0]]), how="zero")
    assert rewards(forest) == [0, 0, 1, -1] and bool(forest.segment["mask"].all())


def test_clipped_rewards():
    forest = shaped("clip_rewards", scored([[5.0, -5.0, 0.5, None]]), low=-1.0, high=2.0)
    assert rewards(forest) == [2, -1, 0.5, 0]


def test_soft_punishment_of_length():
    """Lmax 20, buffer 4: nothing up to 16, then a quarter for each token, no more than 1."""
    lengths = [[16, 17, 18, 20, 25, 20]]
    forest = shaped("overlong", scored([[1.0, 1.0, 0.0, 1.0, 1.0, None]], None, lengths), max_tokens=20, buffer=4)
    is_near(forest.segment["reward"], [1, 0.75, -0.5, 0, 0, 0])
    forest = shaped("overlong", scored([[1.0]], None, [[18]]), max_tokens=20, buffer=4, coef=0.5)
    is_near(forest.segment["reward"], [0.75])


def test_length_counts_sampled_tokens_of_all_segments():
    segments = [Segment([3] * 4), Segment([4] * 9, 0, sampled=False), Segment([5] * 2, 1, reward=1.0)]
    forest = shaped("overlong", Forest.from_trees([Tree(Problem(), [1], segments)]), max_tokens=8, buffer=4)
    is_near(forest.segment["reward"][2:], [0.5])


def likely(values: list[list[float]], means: list[list[float]]) -> Forest:
    """Completions of 1, 2, 3 ... tokens with these mean log-probabilities."""
    lengths = [[place + 1 for place in range(len(group))] for group in values]
    old = [[[mean] * (place + 1) for place, mean in enumerate(group)] for group in means]
    return flat_forest(lengths, values, old_logprobs=old)


def test_what_is_likely_earns_less():
    """beta 0.25, four completions: the likeliest loses 1/4, the next 3/16; the authors' code 3/16, 2/16, 1/16, 0."""
    forest = likely([[1.0, 1.0, 0.0, 1.0]], [[-2.0, -1.0, -0.5, -3.0]])
    is_near(shaped("unlikeliness", forest).segment["reward"], [1 - 2 / 16, 1 - 3 / 16, 0, 1 - 1 / 16])
    authors = shaped("unlikeliness", forest, form="authors")
    is_near(authors.segment["reward"], [1 - 1 / 16, 1 - 2 / 16, 0, 1])


def test_equally_likely_earns_the_same():
    found = shaped("unlikeliness", likely([[1.0, 1.0, 1.0], [1.0]], [[-1.0, -1.0, -2.0], [-9.0]]), beta=1.0)
    is_near(found.segment["reward"], [1 - 2.5 / 3, 1 - 2.5 / 3, 1 - 1 / 3, 0])


def test_ranks_are_those_of_each_group():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 40):
        values = torch.randint(0, 6, (size,), generator=generator).double()
        groups = torch.randint(0, 4, (size,), generator=generator)
        found, count = ranks(values, groups)
        for row in range(size):
            same = groups == groups[row]
            ties = int((values[same] == values[row]).sum())
            assert found[row] == int((values[same] < values[row]).sum()) + (ties - 1) / 2
            assert count[row] == int(same.sum())


@pytest.mark.parametrize("name", ["unlikeliness", "outcome_gate"])
def test_a_reward_below_0_is_refused(name):
    forest = scored([[1.0, -1.0]], [[1.0, 1.0]])
    forest = forest.with_token(old_logprobs=torch.zeros(forest.num_tokens))
    options = {"outcome": "right", "think": "thought"} if name == "outcome_gate" else {}
    with pytest.raises(UserError, match=r"is -1 in tree '0', segment 1; it must not be below 0"):
        shaped(name, forest, **options)


def test_the_gate_gives_nothing_for_what_was_not_said():
    forest = scored([[1.0, 1.0, 0.0]], [[None, 0.5, 1.0]])
    assert rewards(shaped("outcome_gate", forest, outcome="right", think="thought", coef=2.0)) == [1, 2, 0]


# ---------------------------------------------------------------------- a running scale


def test_the_scale_is_of_all_rewards_so_far():
    """The unbiased deviation of batch after batch, as of all at once; equal rewards are not divided."""
    random, seen, state = Random(0), [], {}
    given = Shaper("running_scale", SHAPERS["running_scale"])
    for _ in range(6):
        batch = [random.choice([0.0, 0.5, 1.0, 3.0]) for _ in range(5)]
        seen += batch
        forest = scored([[*batch, None]])
        found, state, metrics = given(forest, state)
        std = torch.tensor(seen, dtype=torch.float64).std()
        is_near(found.segment["reward"], [value / float(std) for value in batch] + [0.0])
        assert metrics["reward/running_std"] == pytest.approx(float(std))
        assert state["mean"] == pytest.approx(sum(seen) / len(seen)) and state["count"] == len(seen)


def test_equal_rewards_are_not_divided():
    given = Shaper("running_scale", SHAPERS["running_scale"])
    found, state, _ = given(scored([[0.1] * 7]), {})
    assert found.segment["reward"].equal(scored([[0.1] * 7]).segment["reward"])
    found, state, _ = given(scored([[None, None]]), state)
    assert state["count"] == 7


def test_the_scale_may_be_centred():
    given = Shaper("running_scale", SHAPERS["running_scale"], {"center": True})
    found, _, _ = given(scored([[1.0, 0.0, 2.0]]), {})
    is_near(found.segment["reward"], [0.0, -1.0, 1.0])


# ---------------------------------------------------------------------- order and columns


class Adds(Estimator):
    """Adds a column, and remembers the rewards that it saw."""

    def __init__(self, column: str) -> None:
        super().__init__()
        self.column = column

    def observe(self, forest: Forest) -> Forest:
        self.saw = rewards(forest)
        self.metrics = {f"{self.column}/seen": 1.0}
        return forest.with_token(**{self.column: torch.zeros(forest.num_tokens)})


@shaper("old_logprobs")
def doubled(forest: Forest) -> Forest:
    return forest.with_segment(reward=forest.segment["reward"] * 2)


def test_shapers_come_behind_what_they_read_and_before_the_rest():
    chosen = observers(resolve({"prm": {"reference": "start"}}), {"prm_logprobs": "credit", "old_logprobs": "a shaper"})
    assert set(chosen.providers) == {"old_logprobs", "ref_logprobs", "prm_logprobs"}
    estimators = {name: Adds(name) for name in chosen.providers}
    clip = Shaper("clip_rewards", SHAPERS["clip_rewards"], {"high": 0.25})
    found = observe(scored([[1.0, 0.0]]), [clip, Shaper("doubled", doubled)], [{}, {}], estimators, chosen)
    assert rewards(found.forest) == [0.5, 0.0]
    assert estimators["old_logprobs"].saw == [0.25, 0.0] and estimators["prm_logprobs"].saw == [0.5, 0.0]
    assert found.metrics["reward/raw"] == 0.5 and found.metrics["prm_logprobs/seen"] == 1
    turned = observe(scored([[1.0, 0.0]]), [Shaper("doubled", doubled), clip], [{}, {}], estimators, chosen)
    assert rewards(turned.forest) == [0.25, 0.0]


def test_what_a_shaper_reads_is_provided():
    parts = build_parts(resolve({"shapers": ["unlikeliness"]}))
    assert list(parts.observers.providers) == ["old_logprobs"]
    assert list(build_parts(resolve({"shapers": ["drop_uniform"]})).observers.providers) == []
    with pytest.raises(UserError, match="shaper 'unlikeliness' needs the column 'old_logprobs'"):
        shaped("unlikeliness", scored([[1.0]]))


def test_nothing_changes_without_shapers():
    forest = scored([[1.0, 0.0]])
    found = observe(forest, [], [], {}, observers(resolve({}), {}))
    assert found.forest is forest and found.metrics == {}


@shaper(state=True)
def counting(forest: Forest, state: dict[str, float], by: float = 1.0) -> Shaped:
    return Shaped(forest, {"seen": state.get("seen", 0.0) + by})


def test_states_go_into_checkpoints_and_come_back(caplog):
    shapers = [Shaper("a", counting), Shaper("clip_rewards", SHAPERS["clip_rewards"]), Shaper("a", counting, {"by": 3})]
    states = fresh_states(shapers)
    for _ in range(2):
        states = observe(scored([[1.0]]), shapers, states, {}, observers(resolve({}), {})).states
    assert states == [{"seen": 2}, {}, {"seen": 6}]
    saved = json.loads(json.dumps(shaper_state(shapers, states)))
    assert restored_states(shapers, saved) == states
    with caplog.at_level(logging.WARNING, "stepcredit"):
        assert restored_states([*shapers, Shaper("b", counting)], saved) == [*states, {}]
    assert "had no shaper 'b' before" in caplog.text
    assert restored_states([], saved) == []


# ---------------------------------------------------------------------- the config


def test_names_and_options_in_every_form(tmp_path):
    """Plain names, options, dotted paths; YAML and the command line; what is written reads as the same."""
    text = "shapers:\n  - positives_only\n  - {name: overlong, buffer: 5}\n  - name: clip_rewards\n    low: -1\n"
    (tmp_path / "run.yaml").write_text(text)
    config = resolve(read_yaml(str(tmp_path / "run.yaml")))
    assert [(each.name, each.options) for each in config.shapers] == [
        ("positives_only", {}),
        ("overlong", {"buffer": 5}),
        ("clip_rewards", {"low": -1}),
    ]
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert resolve(read_yaml(str(tmp_path / "again.yaml"))) == config
    assert config.model_dump(mode="json")["shapers"][0] == "positives_only"  # as it was written before
    line = ["--shapers", "[positives_only, {name: overlong, buffer: 5}, {name: clip_rewards, low: -1}]"]
    assert resolve(parse(line, {}, "train")[0]).shapers == config.shapers
    for given in ("drop_uniform,mask_truncated", "[drop_uniform, mask_truncated]"):
        found = resolve(parse(["--shapers", given], {}, "train")[0])
        assert [each.name for each in found.shapers] == ["drop_uniform", "mask_truncated"]


def test_the_same_shaper_twice_is_no_option_twice(tmp_path):
    (tmp_path / "run.yaml").write_text("shapers: [{name: clip_rewards, low: -1}, {name: clip_rewards, low: 0}]\n")
    assert len(resolve(read_yaml(str(tmp_path / "run.yaml"))).shapers) == 2
    (tmp_path / "run.yaml").write_text("shapers: [{name: clip_rewards, low: -1, low: 0}]\n")
    with pytest.raises(UserError, match="stands there already"):
        read_yaml(str(tmp_path / "run.yaml"))


def test_home_and_environment_in_names(monkeypatch):
    monkeypatch.setenv("CODE", "mine")
    config = resolve({"shapers": ["${CODE}.f", {"name": "${CODE}.g", "text": "${CODE}"}]})
    assert [each.name for each in config.shapers] == ["mine.f", "mine.g"]
    assert config.shapers[1].options == {"text": "${CODE}"}


def test_defaults_of_length_are_the_samplers():
    (found,) = build_shapers(resolve({"shapers": ["overlong"], "sampler": {"max_new_tokens": 100}}))
    assert found.options == {"max_tokens": 100, "buffer": 20}
    (found,) = build_shapers(resolve({"shapers": [{"name": "overlong", "buffer": 7}]}))
    assert found.options == {"max_tokens": 128, "buffer": 7}
    (found,) = build_shapers(resolve({"shapers": [{"name": "overlong", "max_tokens": 50, "buffer": 0}]}))
    assert found.options == {"max_tokens": 50, "buffer": 10}


@pytest.mark.parametrize(
    "given, words",
    [
        ({"algorithm": "remax", "shapers": ["running_scale"]}, "returns of greedy completions"),
        ({"algorithm": "vine", "objective": {"kl": {"estimator": "k1", "coef": 0.1}}}, "values of prefixes"),
        ({"algorithm": "astar_po", "shapers": ["overlong", "mask_truncated"]}, "values of prompts"),
    ],
    ids=str,
)
def test_raw_values_beside_changed_rewards_are_told(given, words, caplog):
    with caplog.at_level(logging.WARNING, "stepcredit"):
        warn_of_raw_values(resolve(given), words)
        warn_of_raw_values(
            resolve({**given, "objective": {}, "shapers": ["drop_uniform", "positives_only"]}), "nothing"
        )
    assert words in caplog.text and "as they are judged" in caplog.text and "nothing" not in caplog.text


def test_a_filter_before_the_gate_is_told(caplog):
    given = {"algorithm": "posterior_grpo", "shapers": [GATE | {"outcome": "chain"}]}
    given["reward"] = {"functions": ["chain", "format_think"], "weights": [1, 0]}
    with caplog.at_level(logging.WARNING, "stepcredit"):
        build_parts(resolve(given))
        assert "outcome_gate" not in caplog.text
        build_parts(resolve(given | {"filter": {"enabled": True, "keep": "varied"}}))
    assert "before outcome_gate can tell them apart" in caplog.text


@pytest.mark.parametrize("name, value", [("low", 0.1), ("oversample", 2.0), ("drop_truncated", True)])
def test_a_filter_that_is_not_on_is_told(name, value):
    with pytest.raises(UserError, match=f"filter.{name} has no effect without --filter.enabled true"):
        build_parts(resolve({"filter": {name: value}}))
    build_parts(resolve({"filter": {name: value, "enabled": True}}))


GATE = {"name": "outcome_gate", "outcome": "exact", "think": "format_think"}
TWO = {"functions": ["exact", "format_think"], "weights": [1, 0]}


@pytest.mark.parametrize(
    "given, words",
    [
        ({"shapers": ["drop"]}, ["shapers", "'drop'", "drop_uniform"]),
        ({"shapers": [{"name": "overlong", "bufer": 3}]}, ["shaper 'overlong'", "'bufer'", "buffer"]),
        ({"shapers": [{"name": "overlong", "buffer": 1.5}]}, ["shaper.buffer", "not a int"]),
        ({"shapers": [{"name": "overlong", "buffer": 500}]}, ["buffer (500)", "max_tokens (128)"]),
        ({"shapers": [{"name": "running_scale", "state": 3}]}, ["no option 'state'", "center"]),
        ({"shapers": [{"name": "drop_uniform", "rewards": "row"}]}, ["'row' is not one of shaped, raw"]),
        ({"shapers": [{"name": "unlikeliness", "beta": 2.0}]}, ["shaper.beta", "less than or equal to 1"]),
        ({"shapers": [{"name": "clip_rewards", "low": 20.0}]}, ["low (20) is above high (10)"]),
        ({"shapers": [{"buffer": 3}]}, ["shapers[0].name", "field required"]),
        ({"shapers": {"name": "overlong"}}, ["shapers", "valid list"]),
        ({"shapers": ["overlong"], "reward": {"functions": ["exact", "overlong"]}}, ["reward function of this run"]),
        ({"algorithm": "posterior_grpo"}, ["name the reward function", "outcome: NAME, think: NAME", "weight 0"]),
        ({"shapers": [GATE]}, ["outcome 'exact' is not among", "chain"]),
        ({"shapers": [GATE], "reward": TWO | {"weights": [1, 1]}}, ["'format_think' has reward.weights 1", "weight 0"]),
        ({"shapers": [GATE | {"think": "exact"}], "reward": TWO}, ["cannot be outcome and thinking"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(given, words):
    with pytest.raises(UserError) as error:
        build_parts(resolve(given))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_what_comes_back_is_looked_at():
    def nothing(forest):
        return None

    def endless(forest):
        return forest.with_segment(reward=forest.segment["reward"] / 0)

    with pytest.raises(UserError, match="shaper 'nothing' returned a NoneType"):
        Shaper("nothing", nothing)(scored([[1.0]]))
    with pytest.raises(UserError, match="shaper 'endless': reward is not finite in tree '0', segment 0"):
        Shaper("endless", endless)(scored([[1.0]]))


# ---------------------------------------------------------------------- invariances


NEEDING = {"unlikeliness": {}, "drop_uniform": {}, "positives_only": {}, "mask_truncated": {}, "running_scale": {}}


@pytest.mark.parametrize("kind", ["flat", "chain", "deep"])
@pytest.mark.parametrize("name", NEEDING)
def test_the_order_of_trees_means_nothing(name, kind):
    forest = Forest.from_trees(random_trees(3, kind, num_trees=6, unsampled=0.2))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    there, here = shaped(name, forest.in_order(order)), shaped(name, forest).in_order(order)
    assert there.segment["mask"].equal(here.segment["mask"])
    torch.testing.assert_close(there.segment["reward"], here.segment["reward"])


# ---------------------------------------------------------------------- runs

SMALL = "--iterations 3 --train.problems-per-iteration 4 --group-size 4 --sampler.max-new-tokens 48 --device cpu"
SMALL += " --optim.schedule constant --num-problems 0 --eval.every 0 --save-every 1"
ENTROPY = "--objective.entropy-target 0.5 --objective.entropy-step 0.01 --objective.entropy-top 0.5"
SCALED = "[{name: running_scale}, {name: overlong, buffer: 20}]"


def test_a_run_with_a_state_goes_on(tmp_path: Path):
    """Two iterations and then the third end as three do: weights, state and metrics."""
    words = ["train", *SMALL.split(), *ENTROPY.split(), "--shapers", SCALED]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*words, "--run-dir", str(whole)]) == 0
    assert main([*words, "--run-dir", str(parts), "--iterations", "2"]) == 0
    assert main(["train", "--resume", str(parts), "--iterations", "3"]) == 0
    states = []
    for run in (whole, parts):
        last = run / "checkpoints" / "000003"
        saved = json.loads((last / "trainer_state" / "state.json").read_text())
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        values = [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens/per"))} for row in rows]
        states.append((saved["shapers"], saved["entropy"], (last / "model.safetensors").read_bytes(), values))
    assert states[0] == states[1]
    (scale,) = states[0][0]
    assert scale["name"] == "running_scale" and scale["state"]["count"] == 48
    assert states[0][3][3]["reward/running_std"] > 0 and "reward/raw" in states[0][3][3]
    assert states[0][1]["coef"] > 0 and states[0][3][3]["policy/entropy_coef"] > 0

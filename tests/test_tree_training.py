"""TreeRPO end to end: the gradient of one row per node, what is computed, metrics, alarms, refusals."""

from pathlib import Path

import pytest
import torch
from builders import objective_of, random_trees
from test_train import metrics, train
from tiny_models import fresh

from stepcredit.cli.main import main
from stepcredit.credit import CREDIT, assign
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.losses.objective import Objective
from stepcredit.losses.weights import AGGREGATORS
from stepcredit.policy.batching import unshared_positions
from stepcredit.policy.forward import Policy
from stepcredit.run.metrics import forest_metrics

COLUMNS = ("old_logprobs", "ref_logprobs", "advantages", "weights")


def credited(seed: int, name: str = "treerpo", **options) -> Forest:
    trees = random_trees(seed, "deep", num_trees=3, unjudged=0.1)
    return assign(Forest.from_trees(trees), name, CREDIT[name], options)


def one_row_per_node(forest: Forest) -> Forest:
    """Each segment that is trained, alone behind all tokens before it: a prompt and a completion."""
    starts, lengths = forest.segment["start"].tolist(), forest.segment["length"].tolist()
    ids, rows = forest.token["token_ids"].tolist(), []
    columns = {name: forest.token[name].tolist() for name in COLUMNS}
    trees = forest.to_trees()
    for index in range(forest.num_segments):
        span = slice(starts[index], starts[index] + lengths[index])
        if not any(columns["weights"][span]):
            continue
        prompt = list(trees[int(forest.segment["tree"][index])].prompt_ids)
        for above in forest.completion_segments(index)[:-1]:
            prompt += ids[starts[above] : starts[above] + lengths[above]]
        own = {name: values[span] for name, values in columns.items()}
        rows.append(Tree(Problem(id=str(index)), prompt, [Segment(ids[span], columns=own, reward=0.0)]))
    return Forest.from_trees(rows)


def gradient(policy: Policy, forest: Forest, objective: Objective, max_tokens: int) -> list[torch.Tensor]:
    policy.zero_grad()
    for part in policy.parts(forest, max_tokens):
        owned = part.with_token(weights=part.token["weights"] * part.token["owned"])
        objective.loss(policy(owned, 0.6, True), owned)[0].backward()
    return [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("max_tokens", [12, 10_000])
@pytest.mark.parametrize("aggregate", AGGREGATORS)
@pytest.mark.parametrize("name", ["treerpo", "spo_tree"])
def test_the_gradient_is_that_of_one_row_per_node(name, aggregate, max_tokens):
    """Loss, KL and entropy over trees that share prefixes, in any parts, against rows that share nothing: 1e-5."""
    objective = objective_of(aggregate=aggregate, kl_coef=0.1, entropy_coef=0.1, constant=6.0, unit="segment")
    for seed in range(3):
        forest = credited(seed, name)
        forest = forest.with_token(weights=objective.weights(forest))
        assert not forest.segment["kept"].all()
        rows, policy = one_row_per_node(forest), fresh("qwen3")
        shared = gradient(policy, forest, objective, max_tokens)
        policy.scoring_form = "plain"
        alone = gradient(policy, rows, objective, max_tokens)
        size = max(float(grad.abs().max()) for grad in alone)
        assert size > 0
        for one, two in zip(shared, alone, strict=True):
            assert float((one - two).abs().max()) < 1e-5 * size


def test_one_row_per_node_is_what_unshared_positions_counts():
    objective = objective_of(unit="segment")
    forest = credited(1)
    forest = forest.with_token(weights=objective.weights(forest))
    trained = forest.token["weights"].new_zeros(forest.num_segments, dtype=torch.bool)
    trained[forest.token["segment"][forest.token["weights"] != 0]] = True
    rows = one_row_per_node(forest)
    assert unshared_positions(forest, trained) == rows.num_tokens + len(rows.prompt_ids)


def test_weights_by_depth():
    """Depth 2 counts three times as much as depth 1; the sum is as before, in every aggregator."""
    trees = [Tree(Problem(id="a"), [1], [Segment([4, 5], finish="cut"), Segment([6], finish="cut")])]
    trees[0].segments += [Segment([7], parent=up, reward=float(up)) for up in (0, 0, 1, 1)]
    trees[0].segments += [Segment([8, 9], parent=1, reward=0.0)]
    forest = assign(Forest.from_trees(trees), "treerpo", CREDIT["treerpo"], {})
    assert forest.segment["kept"].tolist() == [True, True, False, False, True, True, True]
    for aggregate in AGGREGATORS:
        plain = objective_of(aggregate=aggregate, unit="segment", constant=7.0).weights(forest)
        deep = objective_of(aggregate=aggregate, unit="segment", constant=7.0, depth_weights=(1.0, 3.0)).weights(forest)
        torch.testing.assert_close(deep.sum(), plain.sum())
        ratio = (deep / plain)[plain > 0]
        assert float(ratio.max() / ratio.min()) == pytest.approx(3)
        assert ((deep > plain) == (forest.segment["depth"][forest.token["segment"]] == 1) & (plain > 0)).all()


def test_metrics_of_a_tree():
    """Example: two steps, one of whose continuations differ; the other's are all right and pruned."""
    segments = [Segment([4, 5], finish="cut"), Segment([6, 7], finish="cut")]
    segments += [Segment([8], parent=up, reward=reward) for up, reward in ((0, 0.0), (0, 1.0), (1, 1.0), (1, 1.0))]
    forest = assign(Forest.from_trees([Tree(Problem(id="a"), [1], segments)]), "treerpo", CREDIT["treerpo"], {})
    found = forest_metrics(forest)
    assert (found["tree/segments"], found["tree/leaves"]) == (6, 4)
    assert (found["group/siblings"], found["group/siblings_1"], found["group/siblings_2"]) == (3, 1, 2)
    assert found["group/kept"] == pytest.approx(2 / 3)
    assert (found["group/kept_1"], found["group/kept_2"]) == (1.0, 0.5)
    assert found["completion/length"] == 3 and found["tokens/sampled"] == 8
    assert found["value/std_1"] == pytest.approx(0.5 / 2**0.5) and found["value/std_2"] == pytest.approx(0.5)
    assert found["credit/std_2"] == pytest.approx(2 * 2**0.5, rel=1e-5)  # -2 and 2


def test_a_run_computes_only_what_survives(tmp_path: Path):
    """Pruned segments cost nothing: fewer positions than there are tokens; sharing is above 1."""
    assert train(tmp_path / "run", algorithm="treerpo", growth__depth=3, growth__num_branches=3) == 0
    rows = metrics(tmp_path / "run")[1:]
    for row in rows:
        assert 0 < row["group/kept"] < 1
        assert row["tokens/computed"] < row["tokens/sampled"]
        assert row["tokens/sharing"] == pytest.approx(row["tokens/unshared"] / row["tokens/computed"])
        assert row["tokens/sharing"] > 1.5


def test_when_nothing_survives_it_is_said_and_nothing_changes(tmp_path: Path, capsys):
    """A tau that no group reaches: every update is skipped, counted and told of; the exit code says it too."""
    assert train(tmp_path / "run", algorithm="treerpo", credit__tau=1.5) == 1
    rows = metrics(tmp_path / "run")[1:]
    assert all(row["optim/skipped"] == 1 and row["group/kept"] == 0 for row in rows)
    assert "no group of siblings had values further apart" in capsys.readouterr().out


def test_two_updates_an_iteration_split_by_trees(tmp_path: Path):
    """The paper's setting, stepwise and with limits, runs through."""
    options = {"optim__num_minibatches": 2, "growth__mode": "stepwise", "growth__max_segments": 12}
    options |= {"objective__entropy_coef": 0.001, "growth__depth": 3, "objective__depth_weights": "1,1,2"}
    assert train(tmp_path / "run", algorithm="treerpo", **options) == 0
    assert all(row["tree/segments"] <= 12 for row in metrics(tmp_path / "run")[1:])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--growth.name tree", "credit 'grpo' takes flat forests"),
        ("--algorithm treerpo --group-size 4", "growth.group_size is for flat growth"),
        ("--growth.depth 2", "growth.depth is for trees"),
        ("--algorithm treerpo --growth.step.delimiters nowhere", "no token of this tokenizer holds 'nowhere'"),
        ("--algorithm treerpo --objective.depth-weights 1,2,3", "3 numbers for 2 depths"),
        ("--algorithm treerpo --growth.max-tokens 100", "growth.max_tokens"),
        ("--algorithm treerpo --growth.num-branches 1", "growth.num_branches"),
    ],
)
def test_what_does_not_go_together_is_refused(words, said, capsys, tmp_path):
    """In one line, before anything is sampled."""
    assert main(["train", *words.split(), "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1


def test_rewards_outside_zero_and_one_are_refused(tmp_path, capsys):
    """With the paper's scale; another scale takes them."""
    assert train(tmp_path / "one", algorithm="treerpo", reward__weights=3) == 2
    assert "needs rewards in [0, 1]" in capsys.readouterr().err
    assert train(tmp_path / "two", algorithm="treerpo", reward__weights=3, credit__scale="none") == 0


def test_looking_at_a_tree(capsys):
    """`sample --algorithm treerpo` prints the segments, deeper ones further in."""
    words = "sample --algorithm treerpo --growth.num-branches 2 --growth.depth 2 --num-problems 1"
    assert main(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(" " * 9) or line[5:9] == " " * 4 for line in lines) >= 4

"""The greedy completion of each problem: sampled, judged, counted, and not trained on."""

import json
from pathlib import Path

import pytest
import torch

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Tree
from stepcredit.policy.loading import load_policy
from stepcredit.run.build import build_estimators, build_parts, build_rollouts

SMALL = {
    "algorithm": "remax",
    "growth": {"group_size": 2},
    "sampler": {"max_new_tokens": 48},
    "train": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def rollouts():
    config = resolve(SMALL)
    parts = build_parts(config)
    policy = load_policy("embedded", "cpu")
    made = build_rollouts(config, parts, policy)
    return made, build_estimators(config, parts, policy, made)["greedy_return"], parts


def sampled(made, count: int = 5) -> Forest:
    problems = made.task.draw(0, count)
    return made.judge(made.grow(made.sampler, problems, made.encode, made.params, list(range(count))))


def test_it_is_the_likeliest_completion_of_each_problem(rollouts):
    """Against completions that are sampled at temperature 0 and judged alone; the samples stay as they are."""
    made, estimator, _ = rollouts
    forest = sampled(made)
    found = estimator.observe(forest)
    params = made.params.model_copy(update={"temperature": 0.0})
    returns, tokens = [], 0
    for problem in forest.problems:
        prompt = made.encode(problem)
        ((segment,),) = made.sampler.sample([prompt], 1, params, [7])
        judged = made.judge(Forest.from_trees([Tree(problem, prompt, [segment])]))
        returns.append(float(judged.segment["reward"][0]))
        tokens += len(segment.token_ids)
    assert found.token["greedy_return"].tolist() == [returns[tree] for tree in found.token_tree]
    assert estimator.metrics["tokens/greedy"] == tokens and estimator.metrics["reward/greedy_judged"] == 1
    assert estimator.metrics["reward/greedy"] == pytest.approx(sum(returns) / len(returns))
    assert found.num_tokens == forest.num_tokens and found.segment is forest.segment


def test_processes_share_the_problems(rollouts, monkeypatch):
    """Three processes, each with its part, give what one gives."""
    made, estimator, _ = rollouts
    forest = sampled(made)
    whole = estimator.observe(forest).token["greedy_return"]
    parts = [estimator._returns(forest, list(range(5))[rank::3]) for rank in range(3)]
    monkeypatch.setattr(type(made.ranks), "share", lambda self, items: list(items[0::3]))
    monkeypatch.setattr(type(made.ranks), "gather", lambda self, value: [value, *parts[1:]])
    assert estimator.observe(forest).token["greedy_return"].equal(whole)


def test_what_cannot_be_judged_is_no_baseline(rollouts):
    """A problem that no function is for: its completions leave the loss, and the share of the others is told."""
    made, estimator, _ = rollouts
    forest = sampled(made, 2)
    strange = Problem(id="strange", question="?", answer=None)
    forest = Forest(**{**vars_of(forest), "problems": (forest.problems[0], strange)})

    def judge(given: Forest) -> Forest:
        known = torch.tensor([problem.id != "strange" for problem in given.problems])
        return given.with_segment(has_reward=known[given.segment["tree"]])

    class Judging:
        pass

    kept = Judging()
    kept.__dict__ |= {name: getattr(made, name) for name in ("ranks", "sampler", "params")} | {"judge": judge}
    estimator_of = type(estimator)(kept)
    found = estimator_of.observe(forest)
    assert found.segment["mask"].equal(found.segment["tree"] == 0)
    assert estimator_of.metrics["reward/greedy_judged"] == 0.5
    assert found.token["greedy_return"].isfinite().all()


def vars_of(forest: Forest) -> dict:
    names = ("problems", "prompt_ids", "tree", "segment", "token", "details", "tree_extra")
    return {name: getattr(forest, name) for name in names}


def test_a_run_counts_its_tokens(tmp_path: Path):
    words = "--algorithm remax --iterations 2 --group-size 1 --train.problems-per-iteration 6 --num-problems 0"
    words += " --eval.every 0 --sampler.max-new-tokens 48 --device cpu"
    assert main(["train", *words.split(), "--run-dir", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    for row in rows:
        assert 0 < row["tokens/greedy"] < row["tokens/sampled"]
        assert row["tokens/sampled"] == pytest.approx(row["tokens/greedy"] + row["completion/length"] * 6)

"""Where `old_logprobs` come from: the sampler, as long as it agrees with the trainer, or its own forward."""

import logging

import pytest
import torch
from builders import random_forest
from tiny_models import fresh

from stepcredit.config import resolve
from stepcredit.errors import UserError
from stepcredit.estimators import frozen
from stepcredit.estimators.base import Context
from stepcredit.estimators.frozen import AGREES, OldPolicy
from stepcredit.estimators.table import observers
from stepcredit.forest import Forest
from stepcredit.policy.forward import score


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[int]:
    """Trees of every forest that is scored."""
    scored: list[int] = []

    def counted(policy, forest, temperature, max_tokens):
        scored.append(forest.num_trees)
        return score(policy, forest, temperature, max_tokens)

    monkeypatch.setattr(frozen, "score", counted)
    return scored


def rolled_out(policy, error: float = 0.0, trees: int = 20) -> Forest:
    """A forest with the log-probabilities that a sampler which errs by so much would give."""
    forest = random_forest(3, num_trees=trees)
    scores = score(policy, forest, 1.0, 1 << 14)
    noise = torch.zeros(forest.num_tokens)
    noise[0] = error
    return forest.with_token(rollout_logprobs=scores.logprobs + noise, entropy=scores.entropy)


def old(policy, source: str) -> OldPolicy:
    return OldPolicy(policy, 1.0, 1 << 14, source)


def test_a_sampler_that_agrees_saves_the_pass(calls, caplog):
    """The first forest is scored and compared whole. Then the sampler's numbers are taken as they are, and one tree of
    sixteen is scored; the difference is a metric, and one line."""
    policy = fresh("qwen3")
    forest, estimator = rolled_out(policy, AGREES / 2), old(policy, "auto")
    with caplog.at_level(logging.INFO, "stepcredit"):
        first = estimator.observe(forest)
        for _ in range(2):
            seen = estimator.observe(forest)
    assert torch.equal(first.token["old_logprobs"], rolled_out(policy).token["rollout_logprobs"])
    assert torch.equal(seen.token["old_logprobs"], forest.token["rollout_logprobs"])
    assert calls == [20, 1, 1]
    assert estimator.metrics["sampler/logprob_diff"] == pytest.approx(AGREES / 2, rel=0.01)
    assert caplog.text.count("old log-probabilities: the sampler's") == 1
    resumed = old(policy, "auto")
    resumed.load_state_dict(estimator.state_dict())
    assert torch.equal(resumed.observe(forest).token["old_logprobs"], forest.token["rollout_logprobs"])


@pytest.mark.parametrize("late", [False, True])
def test_one_that_does_not_is_left_for_good(calls, caplog, late):
    """From the first forest on, or once a later one differs."""
    policy = fresh("qwen3")
    exact, estimator = rolled_out(policy), old(policy, "auto")
    if late:
        estimator.observe(exact)
    seen = estimator.observe(rolled_out(policy, 10 * AGREES))
    assert torch.equal(seen.token["old_logprobs"], exact.token["rollout_logprobs"])
    assert calls == ([20, 1, 20] if late else [20]) and "a forward of the trainer's own" in caplog.text
    calls.clear()
    estimator.observe(exact)
    resumed = old(policy, "auto")
    resumed.load_state_dict(estimator.state_dict())
    resumed.observe(exact)
    assert calls == [20, 20]


def test_asked_for_by_name(calls, caplog):
    """`forward` scores all and compares nothing; `sampler` stays with the sampler and warns each time."""
    policy = fresh("qwen3")
    forest = rolled_out(policy, 10 * AGREES)
    seen = old(policy, "forward").observe(forest)
    assert calls == [20] and not torch.equal(seen.token["old_logprobs"], forest.token["rollout_logprobs"])
    seen = old(policy, "sampler").observe(forest)
    assert torch.equal(seen.token["old_logprobs"], forest.token["rollout_logprobs"])
    assert caplog.text.count("differ by at most") == 1


def test_a_forest_without_the_sampler_s_numbers_is_scored(calls):
    """Both columns, in one pass."""
    policy = fresh("qwen3")
    bare = random_forest(3, num_trees=4)
    seen = old(policy, "auto").observe(bare)
    assert calls == [4] and {"old_logprobs", "entropy"} <= seen.token.keys()


def built(**given) -> OldPolicy:
    config = resolve({"algorithm": "spro", **given})
    chosen = observers(config, {"old_logprobs": "credit", "entropy": "credit"})
    (estimator,) = chosen.build(Context(config, fresh("qwen3"), chosen.needed)).values()
    assert isinstance(estimator, OldPolicy)
    return estimator


def test_who_may_take_the_sampler_s():
    """Not a run whose importance weights are the ratio of the two, nor one whose sampler is another program."""
    elsewhere = {"name": "vllm", "server": {"urls": ["http://127.0.0.1:1"]}}
    assert built().source == "auto"
    assert built(objective={"importance": "token"}).source == "forward"
    assert built(optim={"num_epochs": 2}).source == built(optim={"num_minibatches": 2}).source == "forward"
    assert built(sampler=elsewhere).source == "forward"
    assert built(estimators={"old_logprobs": "forward"}).source == "forward"
    assert built(estimators={"old_logprobs": "sampler"}).source == "sampler"
    for given, word in (
        ({"objective": {"importance": "token"}}, "importance"),
        ({"sampler": elsewhere}, "another program"),
    ):
        with pytest.raises(UserError, match=rf"estimators.old_logprobs: .*{word}.*take forward"):
            built(estimators={"old_logprobs": "sampler"}, **given)
    with pytest.raises(UserError, match="did you mean 'sampler'"):
        built(estimators={"old_logprobs": "samplr"})

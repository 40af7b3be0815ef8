"""Parts that each are right and together are not: refused or named before anything is sampled; the others train."""

import json
import logging

import pytest
import torch

from stepcredit.cli.main import main
from stepcredit.config.algorithms import ALGORITHMS
from stepcredit.config.resolve import resolve
from stepcredit.credit.base import CreditParts, credit
from stepcredit.errors import UserError
from stepcredit.growth.options import RECORDED
from stepcredit.losses.base import Tokens, loss
from stepcredit.run.build import build_parts

ON_POLICY = {"optim": {"num_epochs": 2, "num_minibatches": 4}}
K1 = {"kl": {"estimator": "k1", "coef": 0.1}}


def own_loss(tokens: Tokens) -> torch.Tensor:
    """Without a declaration."""
    return -tokens.advantages * tokens.logprobs


@loss(ratio=True)
def declared_loss(tokens: Tokens) -> torch.Tensor:
    return -tokens.log_ratio.exp() * tokens.advantages


@credit(forests="tree")
def only_positive(forest) -> CreditParts:
    if "token_rewards" in forest.token and float(forest.token["token_rewards"].min()) < 0:
        raise UserError("rewards below 0")
    return CreditParts(torch.zeros(forest.num_tokens))


def warnings(caplog, **given) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="stepcredit"):
        build_parts(resolve(given))
    return [record.getMessage() for record in caplog.records if record.name == "stepcredit"]


# ---------------------------------------------------------------------- several steps without a ratio


@pytest.mark.parametrize("optim", [{"num_epochs": 2}, {"num_minibatches": 4}, ON_POLICY["optim"]], ids=str)
def test_opo_takes_one_step_a_batch(optim):
    with pytest.raises(UserError, match=r"OPO is exactly on-policy: take --optim\.num-epochs 1") as error:
        build_parts(resolve({"algorithm": "opo", "optim": optim}))
    assert "reinforce" in str(error.value) and "\n" not in str(error.value)


def test_opo_with_a_ratio_takes_several(caplog):
    assert warnings(caplog, algorithm="opo", loss={"name": "clip"}, **ON_POLICY) == []
    assert warnings(caplog, algorithm="opo") == []


@pytest.mark.parametrize("name", ["reinforce", f"{__name__}.own_loss"])
def test_other_credit_is_told_what_is_biased(caplog, name):
    (found,) = [text for text in warnings(caplog, loss={"name": name}, **ON_POLICY) if "biased" in text]
    assert f"8 optimiser steps on a batch, and loss '{name}' has no ratio" in found
    assert not any("biased" in text for text in warnings(caplog, loss={"name": name}))


@pytest.mark.parametrize("name", ["em_pg", "raft"])
def test_where_several_steps_are_meant_it_is_said_so(caplog, name):
    """As information, not as a warning; with another loss without a ratio it is a warning again."""
    assert warnings(caplog, algorithm=name, **ON_POLICY) == []
    with caplog.at_level(logging.INFO, logger="stepcredit"):
        build_parts(resolve({"algorithm": name, **ON_POLICY}))
    (found,) = [record.getMessage() for record in caplog.records if "That is meant" in record.getMessage()]
    assert "8 optimiser steps on a batch" in found and f"arXiv {ALGORITHMS[name].paper}" in found
    (biased,) = warnings(caplog, algorithm=name, loss={"name": f"{__name__}.own_loss"}, **ON_POLICY)[-1:]
    assert "biased" in biased


def test_one_tree_is_one_step(caplog):
    """More minibatches than problems are as many as there are problems."""
    given = {"loss": {"name": "reinforce"}, "optim": {"num_minibatches": 4}}
    assert warnings(caplog, **given, train={"problems_per_iteration": 1}) == []
    (found,) = warnings(caplog, **given, train={"problems_per_iteration": 3})
    assert "3 optimiser steps" in found


def test_losses_with_a_ratio_are_told_nothing(caplog):
    for name in ("clip", "cispo", "gspo", "gspo_token"):
        assert warnings(caplog, loss={"name": name}, **ON_POLICY) == []
    texts = warnings(caplog, loss={"name": f"{__name__}.declared_loss"}, **ON_POLICY)
    assert not any("biased" in text for text in texts)


# ---------------------------------------------------------------------- a penalty in the reward


@pytest.mark.parametrize("growth", [{}, {"name": "flat"}], ids=str)
@pytest.mark.parametrize("scale", ["variance", "sqrt"])
def test_values_in_the_unit_interval_take_no_penalty(scale, growth):
    given = {"algorithm": "treerpo", "credit": {"scale": scale}, "objective": K1}
    if growth:
        given["growth"] = growth | {"depth": 3, "num_branches": 8, "step": {"tokens": None, "delimiters": []}}
    with pytest.raises(UserError, match=r"objective\.kl\.estimator k1") as error:
        build_parts(resolve(given))
    assert "'treerpo'" in str(error.value) and "--objective.kl.estimator k3 or k2" in str(error.value)


def test_what_takes_a_penalty_is_let_through(caplog):
    """Values of trees add up token rewards; a penalty of 0 is none."""
    assert warnings(caplog, algorithm="treerpo", credit={"scale": "none"}, objective=K1) == []
    assert warnings(caplog, algorithm="treerpo", credit={"scale": "std"}, objective=K1) == []
    assert warnings(caplog, algorithm="spo_tree", objective=K1) == []
    assert warnings(caplog, algorithm="treerpo", objective={"kl": {"estimator": "k1", "coef": 0.0}}) == []


def test_credit_of_ones_own_is_asked_too():
    given = {"algorithm": "treerpo", "credit": {"name": f"{__name__}.only_positive"}}
    build_parts(resolve(given | {"objective": {"kl": {"estimator": "k2", "coef": 0.1}}}))
    with pytest.raises(UserError, match=r"objective\.kl\.estimator k1: .*rewards below 0"):
        build_parts(resolve(given | {"objective": K1}))


SMALL = {
    "iterations": "2",
    "train.problems-per-iteration": "4",
    "sampler.max-new-tokens": "64",
    "num-problems": "0",
    "eval.every": "0",
    "device": "cpu",
    "sampler.temperature": "1",
    "objective.kl.coef": "0.05",
    "optim.num-epochs": "1",
}


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_with_every_penalty(tmp_path, capsys, algorithm, estimator):
    """Two iterations, or a refusal with advice before the first; the second begins away from the reference."""
    growth = ALGORITHMS[algorithm].growth.get("name", "flat")
    shape = {"growth.num-branches": "3", "growth.depth": "2"} if growth == "tree" else {"group-size": "4"}
    if growth in RECORDED:
        data = tmp_path / "rows.jsonl"
        rows = [{"prompt": f"Amy = {n} . Amy ?", "chosen": f" #### {n}", "rejected": " #### 0"} for n in range(1, 9)]
        data.write_text("".join(json.dumps(row | {"completion": row["chosen"]}) + "\n" for row in rows))
        shape = {"data": str(data)}
    options = (
        SMALL | shape | {"algorithm": algorithm, "objective.kl.estimator": estimator, "run-dir": str(tmp_path / "run")}
    )
    options |= {"prm.reference": "start", "filter.enabled": "false"} if algorithm == "prime" else {}
    options |= {"optim.num-epochs": "1", "optim.num-minibatches": "1"}  # metrics are means over the steps
    options |= {"learning-rate": "0.002"} if algorithm == "unlikeliness" else {}  # few groups differ, so it moves less
    if algorithm == "posterior_grpo":
        gate = "[{name: outcome_gate, outcome: chain, think: format_think}]"
        options |= {"reward.functions": "chain,format_think", "reward.weights": "1,0", "shapers": gate}
    code = main(["train", *(word for name, value in options.items() for word in (f"--{name}", value))])
    if (algorithm, estimator) == ("treerpo", "k1"):
        assert code == 2 and "--objective.kl.estimator k3 or k2" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
        return
    if growth in RECORDED and estimator == "k1":
        assert code == 2 and "needs samples of the policy" in capsys.readouterr().err
        return
    assert code == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    name = "policy/kl_ref" if estimator == "k1" else "policy/kl_ref_update"  # in the reward, or in the loss
    assert abs(rows[1][name]) < 1e-5 < abs(rows[2][name])


# ---------------------------------------------------------------------- a warm-up without an end


@pytest.mark.parametrize("warmup, told", [(0, False), (4, False), (5, True), (9, True)])
def test_a_warmup_that_does_not_end_is_told(caplog, warmup, told):
    found = warnings(caplog, optim={"warmup": warmup, "learning_rate": 0.01}, train={"iterations": 5})
    assert [f"optim.warmup {warmup} is not below train.iterations 5" in text for text in found] == [True] * told

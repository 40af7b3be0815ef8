"""What adds columns: who reads which, in which order, and what is said when nothing adds one. Heads of a policy."""

import sys
from pathlib import Path

import pytest
import torch
from builders import random_forest
from tiny_models import fresh

from stepcredit.config import resolve
from stepcredit.config.algorithms import ALGORITHMS
from stepcredit.credit import CREDIT
from stepcredit.errors import UserError
from stepcredit.estimators.base import Context, Estimator, Load, provider
from stepcredit.estimators.penalty import RewardPenalty
from stepcredit.estimators.reads import models_beside
from stepcredit.estimators.table import PROVIDERS, observers
from stepcredit.forest import Forest
from stepcredit.forest.ops import cumsum_along_path
from stepcredit.learn.learner import Learner
from stepcredit.learn.options import AdamWOptions
from stepcredit.learn.placement import UNSHARDED
from stepcredit.policy.forward import Policy
from stepcredit.policy.heads import add_head, load_heads, save_heads
from stepcredit.policy.loading import load_policy
from stepcredit.run.build import build_estimators, build_parts
from stepcredit.run.checkpoint import load_learner, save_checkpoint

close = torch.testing.assert_close


def order(wanted: dict[str, str], there: tuple[str, ...] = (), **given) -> list[str]:
    return list(observers(resolve(given), wanted, there).providers)


# ---------------------------------------------------------------------- who comes when


def test_each_comes_behind_what_it_reads():
    assert order({"prm_logprobs": "credit"}, prm={"reference": "start"}) == ["ref_logprobs", "prm_logprobs"]
    found = order({"prm_logprobs": "credit"}, prm={"reference": "policy"})
    assert found == ["old_logprobs", "ref_logprobs", "prm_logprobs"]
    found = order({"token_rewards": "kl", "prm_logprobs": "credit"}, prm={"reference": "policy"})
    assert found.index("token_rewards") > max(found.index("old_logprobs"), found.index("ref_logprobs"))


def test_what_rollouts_bring_needs_nobody():
    assert order({"entropy": "credit", "rollout_logprobs": "loss"}, ("entropy", "rollout_logprobs")) == []
    assert order({"entropy": "credit"}) == ["old_logprobs"]  # the same forward gives both
    assert order({"entropy": "credit", "old_logprobs": "loss"}) == ["old_logprobs"]


@pytest.mark.parametrize("name", [name for name in CREDIT if name in ALGORITHMS])
def test_every_algorithm_has_its_columns(name):
    """In the order in which they were always observed."""
    algorithm = {"reward_to_go": "grpo", "gae": "ppo"}.get(name, name)
    config = resolve({"algorithm": algorithm})
    expected = {"spro": ["old_logprobs", "ref_logprobs"], "prime": ["old_logprobs", "ref_logprobs", "prm_logprobs"]}
    expected |= {"treerpo": ["ref_logprobs"], "remax": ["greedy_return"], "vine": ["prefix_value"], "ppo": ["values"]}
    assert list(build_parts(config).observers.providers) == expected.get(algorithm, [])


def test_nothing_adds_a_column():
    with pytest.raises(UserError) as error:
        order({"my_values": "credit 'mine'"})
    assert "credit 'mine' needs my_values" in str(error.value) and "--estimators.my_values" in str(error.value)


class Constant(Estimator):
    def __init__(self, column: str, value: float) -> None:
        super().__init__()
        self.column, self.value = column, value

    def observe(self, forest: Forest) -> Forest:
        return forest.with_segment(**{self.column: torch.full((forest.num_segments,), self.value)})


@provider(needs=("second",))
def first(context: Context, value: float = 1.0) -> Constant:
    return Constant("first", value)


@provider(needs=("old_logprobs",), loads=[Load("helper", "embedded")])
def second(context: Context) -> Constant:
    return Constant("second", 2.0)


@provider(needs=("first",))
def circular(context: Context) -> Constant:
    raise AssertionError("never built")


HERE = __name__


def test_estimators_of_ones_own():
    """By dotted path, with options; what they need is found too, and what they hold."""
    own = {"first": {"name": f"{HERE}.first", "value": 5.0}, "second": f"{HERE}.second"}
    config = resolve({"estimators": own})
    chosen = observers(config, {"first": "credit 'mine'"})
    assert list(chosen.providers) == ["old_logprobs", "second", "first"]
    assert chosen.needed == {"first", "second", "old_logprobs"}
    assert chosen.loads(config) == [Load("helper", "embedded")]
    context = Context(config, fresh("qwen3"), chosen.needed)
    forest = random_forest(1)
    for estimator in chosen.build(context).values():
        forest = estimator.observe(forest)
    assert forest.segment["first"].unique().tolist() == [5.0] and forest.has("second")
    assert torch.cat([one.segment["second"] for one in (forest, forest)]).equal(
        Forest.join([forest, forest]).segment["second"]
    )


@pytest.mark.parametrize(
    "own, words",
    [
        ({"first": f"{HERE}.first", "second": f"{HERE}.circular"}, ["first", "second", "one cannot come before"]),
        ({"first": f"{HERE}.first"}, ["estimator of first", "needs second", "--estimators.second"]),
        ({"first": {"name": f"{HERE}.first", "valu": 1.0}}, ["estimators.first", "'valu'", "did you mean 'value'"]),
        ({"first": f"{HERE}.nothing"}, ["estimators.first", "nothing"]),
        ({"first": {"value": 1.0}}, ["estimators.first"]),
    ],
)
def test_estimators_that_do_not_fit(own, words):
    with pytest.raises(UserError) as error:
        observers(resolve({"estimators": own}), {"first": "credit 'mine'"})
    assert all(word in str(error.value) for word in words), error.value


def test_what_a_run_holds_beside_the_policy():
    """For the memory plan: names and models, those that learn, those that are adapters on the policy's own weights."""

    def held(**given) -> list[tuple[str, bool]]:
        return [(load.name, load.learns) for load in models_beside(resolve(given))]

    assert held() == [] and held(algorithm="treerpo") == [("reference", False)]
    assert held(algorithm="spro") == [("reference", False)]
    assert held(algorithm="spro", lora={"rank": 4}) == []
    assert held(algorithm="prime", prm={"reference": "start"}) == [("reference", False), ("reward model", True)]
    assert held(algorithm="prime", prm={"reference": "policy"}) == [("reward model", True)]
    assert held(algorithm="prime", prm={"reference": "start", "update": "none"})[1] == ("reward model", False)


# ---------------------------------------------------------------------- the penalty in the reward


def test_the_penalty_is_in_what_returns_are_made_of():
    forest = random_forest(4, "chain", unsampled=0.3)
    found = RewardPenalty(0.5).observe(forest)
    apart = (forest.token["old_logprobs"] - forest.token["ref_logprobs"]) * forest.token_sampled
    close(found.token["token_rewards"], -0.5 * apart)
    again = RewardPenalty(0.5).observe(found)
    close(cumsum_along_path(again, again.token["token_rewards"]), -cumsum_along_path(forest, apart))


def test_the_penalty_is_an_estimator_of_the_run():
    kl = {"kl": {"estimator": "k1", "coef": 0.1}}
    config = resolve({"algorithm": "reinforce_pp", "objective": kl})
    found = build_estimators(config, build_parts(config), fresh("qwen3"))
    assert list(found) == ["old_logprobs", "ref_logprobs", "token_rewards"]
    assert isinstance(found["token_rewards"], RewardPenalty)
    assert PROVIDERS["token_rewards"].declared.needs(config, ()) == ("old_logprobs", "ref_logprobs")


# ---------------------------------------------------------------------- heads


def with_head(path: str = "forest") -> Policy:
    policy = fresh("qwen3")
    policy.scoring_form = path
    add_head(policy, "value")
    weight = policy.heads["value"].linear.weight
    weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return policy


@pytest.mark.parametrize("path", ["forest", "cached"])
@pytest.mark.parametrize("kind", ["flat", "deep"])
def test_a_head_reads_the_state_before_each_token(path, kind):
    """All forms agree; the first token of a completion has the value of the prompt, whichever completion it is."""
    forest = random_forest(3, kind, unsampled=0.2)
    values = with_head(path)(forest, head="value")
    close(values, with_head("plain")(forest, head="value"), atol=1e-4, rtol=1e-4)
    assert values[~forest.token_sampled].abs().max() == 0 and values.abs().max() > 0
    first = (forest.previous_token < 0) & forest.token_sampled
    for tree in range(forest.num_trees):
        same = values[first & (forest.token_tree == tree)]
        close(same, same[:1].expand(len(same)))


def test_a_new_head_says_zero_and_leaves_log_probabilities_alone():
    forest, plain = random_forest(3), fresh("qwen3")
    policy = fresh("qwen3")
    add_head(policy, "value")
    assert policy(forest, head="value").abs().max() == 0
    assert policy(forest).logprobs.equal(plain(forest).logprobs)


def test_the_gradient_of_a_head_reaches_head_and_model():
    policy, forest = with_head(), random_forest(3, "deep")
    policy(forest, head="value").square().sum().backward()
    assert policy.heads["value"].linear.weight.grad.abs().max() > 0
    grads = [value.grad for name, value in policy.model.named_parameters() if "lm_head" not in name]
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)
    parameter = policy.heads["value"].linear.bias
    before = policy(forest, head="value").sum()
    with torch.no_grad():
        parameter.add_(1.0)
    close(policy(forest, head="value").sum() - before, forest.token_sampled.sum().float())


def test_heads_are_saved_and_loaded(tmp_path):
    policy, other = with_head(), fresh("qwen3")
    save_heads(policy, dict(policy.heads.state_dict()), tmp_path)
    load_heads(other, tmp_path)
    forest = random_forest(3)
    assert other(forest, head="value").equal(policy(forest, head="value"))
    with pytest.raises(UserError, match="does not fit"):
        small = fresh("qwen3")
        small.model.config.hidden_size = 8
        load_heads(small, tmp_path)


def test_a_checkpoint_keeps_heads_and_their_optimiser(tmp_path):
    policy, forest = load_policy("embedded", "cpu"), random_forest(3)
    add_head(policy, "value")
    learner = Learner(policy, UNSHARDED, AdamWOptions(learning_rate=1e-2), 4096)
    policy(forest, head="value").square().sum().backward()
    learner.step()
    folder = save_checkpoint(tmp_path, "000001", {"": learner}, {}, keep=1)
    other = load_policy("embedded", "cpu")
    add_head(other, "value")
    again = Learner(other, UNSHARDED, AdamWOptions(learning_rate=1e-2), 4096)
    load_learner(again, folder, "")
    assert other(forest, head="value").equal(policy(forest, head="value"))
    found, expected = again.tensors(), learner.tensors()
    assert "heads.value.linear.weight.exp_avg" in found
    assert all(found[name].equal(value) for name, value in expected.items())


# ---------------------------------------------------------------------- examples of extensions

EXAMPLES = Path(__file__).parents[1] / "examples" / "extensions"
OWN_PARTS = {
    "squared loss": ["--loss.name", "squared_loss.squared", "--loss.scale", "0.2", "--optim.num-minibatches", "2"],
    "critic": ["--credit.name", "critic.gae", "--estimators.values", "critic.critic"],
    "values from rollouts": [
        "--credit.name",
        "prefix_values.halves",
        "--estimators.middle",
        "prefix_values.prefix_values",
    ],
    "dialogue": ["--growth.name", "dialogue.dialogue", "--growth.options", "{turns: 2, group_size: 3}"],
    "sampler": ["--sampler.name", "noisy_sampler.noisy", "--sampler.options", "{noise: 0.0}"],
}


@pytest.mark.parametrize("words", OWN_PARTS.values(), ids=list(OWN_PARTS))
def test_an_extension_is_one_file_and_no_edit(words, tmp_path, monkeypatch, capsys):
    """CONTRIBUTING.md points at these files: each runs, learns, is saved and resumed as it stands."""
    from stepcredit.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    tiny = ["--train.problems-per-iteration", "3", "--max-new-tokens", "24", "--eval.num-problems", "0"]
    tiny += ["--run-dir", "run", "--checkpoint.every", "1"]
    assert main(["train", "--iterations", "2", *tiny, *words]) in (0, 1), capsys.readouterr().err
    assert main(["train", "--resume", "run", "--iterations", "3"]) in (0, 1), capsys.readouterr().err
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 4 and any("optim/grad_norm" in row for row in rows)
    if "critic.gae" in words:
        saved = tmp_path / "run" / "checkpoints" / "000003" / "values"
        assert (saved / "heads.safetensors").is_file() and '"critic/value"' in rows[-1]
    for name in ("squared_loss", "critic", "prefix_values", "dialogue", "noisy_sampler"):
        sys.modules.pop(name, None)

"""The critic: its values, targets and gradients, what trains it, its state, its limits, and whole runs with it."""

import copy
import os
import signal

import pytest
import torch
from builders import random_trees
from test_train import metrics, train
from tiny_models import fresh
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from stepcredit.cli.main import main
from stepcredit.config import resolve
from stepcredit.credit.gae import Returns, cut_off
from stepcredit.errors import UserError
from stepcredit.estimators.critic import Critic, returns_of
from stepcredit.estimators.measures import value_metrics
from stepcredit.estimators.options import CriticOptions
from stepcredit.estimators.reads import models_beside
from stepcredit.estimators.value_losses import gaussian_bins, squares
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.learn.adapters import add_adapters
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import load_policy
from stepcredit.run.build import build_parts
from stepcredit.run.checkpoint import load_checkpoint, newest_checkpoint

close = torch.testing.assert_close
WHOLE = Returns(1.0, 1.0)
KINDS = ("flat", "chain", "deep")


def judged(kind: str = "flat", seed: int = 0, **options) -> Forest:
    """Rewards of 0, 1/2 and 1, cut-off completions, and some without a reward."""
    return Forest.from_trees(random_trees(seed, kind, columns=(), **options))


def critic(returns: Returns = WHOLE, family: str = "qwen3", **options) -> Critic:
    own = {name: options.pop(name) for name in ("max_tokens", "seed") if name in options}
    return Critic(fresh(family), CriticOptions(**{"learning_rate": 1e-3} | options), returns, **own)


def with_weights(model: Critic, seed: int = 0) -> Critic:
    """A head that says something; the same for every critic of a seed."""
    generator = torch.Generator().manual_seed(seed)
    for value in weights_of_head(model):
        value.data.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return model


def weights_of_head(model: Critic) -> list[Tensor]:
    shared = model.options.backbone == "policy"
    return list((model.learner.head if shared else model.policy.heads["value"]).parameters())


def weights(model: Critic) -> list[Tensor]:
    return [value.detach().clone() for value in (*model.policy.parameters(), *weights_of_head(model))]


def same(one: Critic, two: Critic) -> bool:
    return all(a.equal(b) for a, b in zip(weights(one), weights(two), strict=True))


def caught_gradient(model: Critic, forest: Forest, monkeypatch) -> list[Tensor]:
    """Of the one optimiser step of a batch, which is not taken."""
    caught: list[Tensor] = []

    def catch(parameters, norm: float) -> Tensor:
        caught.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters)
        return torch.tensor(1.0)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", catch)
        patch.setattr(model.learner.optimizer, "step", lambda: None)
        model.observe(forest)
    return caught


# ---------------------------------------------------------------------- values and targets


@pytest.mark.parametrize("loss, value", [("mse", 0.0), ("bce", 0.5), ("hl_gauss", 0.5)])
def test_at_first_all_states_are_worth_the_same(loss, value):
    forest = judged(unsampled=0.2)
    found = critic(loss=loss, update="none").observe(forest).token["values"]
    close(found[forest.token_sampled], torch.full((int(forest.token_sampled.sum()),), value))
    assert found[~forest.token_sampled].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_of_the_state_before_its_token(kind):
    """The first tokens of all completions of a problem have one value; another token there changes nothing."""
    forest, model = judged(kind, seed=3), with_weights(critic(update="none"))
    values = model.observe(forest).token["values"]
    for tree in range(forest.num_trees):
        first = values[(forest.previous_token < 0) & (forest.token_tree == tree)]
        close(first, first[:1].expand(len(first)))
    last = (forest.segment["start"] + forest.segment["length"] - 1)[forest.ends]
    ids = forest.token["token_ids"].clone()
    ids[last] = (ids[last] + 7) % 50
    close(model.observe(forest.with_token(token_ids=ids)).token["values"], values)
    assert values.std() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_behind_a_completion_that_was_cut_off(kind):
    """That of a plain row one token longer, at the last token of each such completion; 0 elsewhere."""
    forest = judged(kind, seed=6, num_trees=5)
    model = with_weights(critic(Returns(1.0, 1.0, "value"), update="none"))
    after, leaves = model.observe(forest).token["value_after"], cut_off(forest)
    last = (forest.segment["start"] + forest.segment["length"] - 1)[leaves]
    head = weights_of_head(model)
    expected = []
    for leaf in leaves.nonzero().squeeze(1).tolist():
        tree = int(forest.segment["tree"][leaf])
        begin = int(forest.tree["prompt_start"][tree])
        ids = forest.prompt_ids[begin : begin + int(forest.tree["prompt_length"][tree])].tolist()
        for segment in forest.completion_segments(leaf):
            start = int(forest.segment["start"][segment])
            ids += forest.token["token_ids"][start : start + int(forest.segment["length"][segment])].tolist()
        plain = fresh("qwen3").model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        expected.append(head[0][0] @ plain + head[1][0])
    assert len(expected) > 2
    close(after[last], torch.stack(expected).detach(), atol=1e-4, rtol=1e-4)
    assert after.abs().gt(0).sum() == len(expected)
    regular = forest.with_segment(finish=torch.zeros_like(forest.segment["finish"]))
    assert model.observe(regular).token["value_after"].abs().max() == 0


@pytest.mark.parametrize("returns", [WHOLE, Returns(0.9, 0.5, "hold_last"), Returns(0.9, 0.8, "value")], ids=str)
def test_targets_are_the_returns_of_the_values_before_the_batch(returns):
    forest, model = judged("deep", seed=2), with_weights(critic(returns, num_epochs=2))
    before = with_weights(critic(returns, update="none")).observe(forest)
    found = model.observe(forest)
    close(found.token["values"], before.token["values"], atol=1e-5, rtol=0)
    close(found.token["value_target"], returns.of(before, before.token["values"]).float(), atol=1e-5, rtol=0)
    assert found.token["value_target"].abs().max() > 0.1


def count_calls(monkeypatch) -> list[bool]:
    """Whether gradients were on, of every forward call."""
    calls: list[bool] = []
    forward = Policy.forward

    def counted(self, *args, **options):
        calls.append(torch.is_grad_enabled())
        return forward(self, *args, **options)

    monkeypatch.setattr(Policy, "forward", counted)
    return calls


@pytest.mark.parametrize(
    ("returns", "options", "expected"),
    [
        (WHOLE, {}, [True]),
        (WHOLE, {"clip": 0.2}, [True]),
        (WHOLE, {"num_epochs": 2}, [False, True, True]),
        (WHOLE, {"num_minibatches": 2}, [False, True, True]),
        (Returns(1.0, 0.95), {}, [False, True]),
        (Returns(1.0, 1.0, "hold_last"), {}, [False, True]),
        (WHOLE, {"update": "none"}, [False]),
    ],
    ids=str,
)
def test_nothing_is_computed_twice(monkeypatch, returns, options, expected):
    """One pass where targets need no values and there is one step; a scoring pass first otherwise. The values agree."""
    forest, model = judged("deep", seed=1), with_weights(critic(returns, **options))
    scored = with_weights(critic(returns, update="none")).observe(forest).token["values"]
    before, calls = weights(model), count_calls(monkeypatch)
    found = model.observe(forest).token["values"]
    assert calls == expected
    close(found, scored, atol=1e-5, rtol=0)
    moved = not all(a.equal(b) for a, b in zip(before, weights(model), strict=True))
    assert moved == (options.get("update") != "none")


# ---------------------------------------------------------------------- gradients


def plain_loss(model: Critic, forest: Forest, clip: float) -> Tensor:
    """The mean over active tokens, from one row for each completion; a shared token is taken from its first one."""
    plain, target = copy.deepcopy(model.policy), forest.token["value_target"]
    plain.scoring_form = "plain"
    total, seen = [], set()
    for leaf in forest.segment["is_leaf"].nonzero().squeeze(1).tolist():
        tree = int(forest.segment["tree"][leaf])
        begin = int(forest.tree["prompt_start"][tree])
        prompt = forest.prompt_ids[begin : begin + int(forest.tree["prompt_length"][tree])].tolist()
        rows = [
            row
            for segment in forest.completion_segments(leaf)
            for row in range(
                int(forest.segment["start"][segment]),
                int(forest.segment["start"][segment] + forest.segment["length"][segment]),
            )
        ]
        ids = forest.token["token_ids"][rows].tolist()
        states = plain.model.base_model(torch.tensor([[*prompt, *ids]])).last_hidden_state[0, len(prompt) - 1 : -1]
        outputs = plain.heads["value"].linear(states)
        for place, row in enumerate(rows):
            if row in seen or not forest.active[row]:
                continue
            seen.add(row)
            total.append(token_loss(model.options, outputs[place], target[row], forest.token["old"][row], clip))
    assert len(seen) == int(forest.active.sum())
    loss = torch.stack(total).mean()
    loss.backward()
    model.plain = plain  # type: ignore[attr-defined]
    return loss


def token_loss(options: CriticOptions, output: Tensor, target: Tensor, old: Tensor, clip: float) -> Tensor:
    """The losses once more, a token at a time."""
    if options.loss == "bce":
        return binary_cross_entropy_with_logits(output[0], target)
    if options.loss == "hl_gauss":
        width = (options.high - options.low) / options.num_bins
        normal = torch.distributions.Normal(target.double(), options.sigma * width)
        edges = options.low + width * torch.arange(options.num_bins + 1, dtype=torch.float64)
        share = normal.cdf(edges).diff()
        return -((share / share.sum()).float() * output.log_softmax(0)).sum()
    error = (output[0] - target) ** 2
    if clip:
        error = torch.maximum(error, (output[0].clamp(old - clip, old + clip) - target) ** 2)
    return error / 2


@pytest.mark.parametrize("max_tokens", [16, 4096])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["mse", "clipped", "bce", "hl_gauss"])
def test_the_gradient_is_that_of_plain_autograd(loss, kind, max_tokens, monkeypatch):
    """Of every loss, whatever the shapes and micro-batches; for the clipped one the old values are moved first."""
    options = {"loss": "mse", "clip": 0.3} if loss == "clipped" else {"loss": loss}
    forest = judged(kind, seed=3, num_trees=6, unjudged=0.3)
    model = with_weights(critic(max_tokens=max_tokens, **options))
    values = with_weights(critic(update="none", **options)).observe(forest)
    shift = torch.linspace(-1, 1, forest.num_tokens) if loss == "clipped" else torch.zeros(forest.num_tokens)
    forest = values.with_token(old=values.token["values"] + shift)
    if loss == "clipped":
        monkeypatch.setattr(model, "_score", lambda f: forest.token["old"])
        monkeypatch.setattr(model, "returns", Returns(1.0, 1.0, "hold_last"))
        monkeypatch.setattr(model, "_with_target", lambda f: f.with_token(value_target=forest.token["value_target"]))
    found = caught_gradient(model, forest, monkeypatch)
    expected = float(plain_loss(model, forest, options.get("clip", 0.0)).detach())
    assert model.metrics["critic/loss"] == pytest.approx(expected, rel=1e-4)
    wanted = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.plain.parameters()]
    size = max(float(grad.abs().max()) for grad in wanted)
    assert size > 1e-3
    for one, two in zip(found, wanted, strict=True):
        assert float((one - two).abs().max()) < 5e-5 * size


def test_a_clipped_value_has_no_gradient_beyond_the_clip():
    """V moved by .5 with a clip of .2 towards the target: the loss is that of the moved bound, and flat."""
    form, value = squares(0.2), torch.tensor([0.5, 0.1, -0.5], requires_grad=True)
    loss = form.loss(value, torch.ones(3), torch.zeros(3))
    loss.sum().backward()
    close(loss.detach(), torch.tensor([0.8**2 / 2, 0.9**2 / 2, 1.5**2 / 2]))
    close(value.grad, torch.tensor([0.0, -0.9, -1.5]))


def test_bins_by_hand():
    """Two bins of [0, 1] of a target of 1/2 have a half each; of 0 nearly all is in the first; values are means."""
    form = gaussian_bins(0.0, 1.0, 2, 0.5)
    zeros = torch.zeros(3, 2)
    close(form.decode(torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0]])), torch.tensor([0.5, 0.25, 0.75]))
    close(form.loss(zeros, torch.tensor([0.5, 0.0, 9.0]), zeros[:, 0]), torch.full((3,), 2.0).log())
    logits = torch.tensor([[0.0, 1.0]])
    first = (torch.erf(torch.tensor(2**0.5)) / torch.erf(torch.tensor(2 * 2**0.5))).item()
    expected = -(first * logits.log_softmax(-1)[0, 0] + (1 - first) * logits.log_softmax(-1)[0, 1])
    close(form.loss(logits, torch.zeros(1), torch.zeros(1)), expected[None])


# ---------------------------------------------------------------------- what trains it


def test_masked_and_unjudged_completions_do_not_train_it():
    forest = judged("flat", seed=2)
    silent = forest.with_segment(mask=torch.zeros_like(forest.segment["mask"]))
    model = critic()
    before = weights(model)
    model.observe(silent)
    assert all(a.equal(b) for a, b in zip(before, weights(model), strict=True))
    part = forest.segment["mask"].clone()
    part[::2] = False
    one, two = with_weights(critic()), with_weights(critic())
    one.observe(forest.with_segment(mask=part))
    two.observe(forest.with_segment(has_reward=forest.segment["has_reward"] & part))
    assert same(one, two) and not same(one, with_weights(critic()))


@pytest.mark.parametrize("kind", KINDS)
def test_it_may_learn_from_finished_completions_alone(kind):
    """As T-PPO's critic does: a cut-off completion counts as one without a reward, for the loss."""
    forest = judged(kind, seed=4, num_trees=5)
    cut = cut_off(forest)
    assert cut.any() and (forest.segment["has_reward"] & ~cut).any()
    one, two = with_weights(critic(learn_from="finished")), with_weights(critic())
    one.observe(forest)
    two.observe(forest.with_segment(has_reward=forest.segment["has_reward"] & ~cut))
    if kind == "deep":  # where both kinds share tokens the mean over the children is another
        assert not same(one, with_weights(critic()))
        return
    assert same(one, two)


def test_it_learns_the_returns():
    """Many rounds on one batch, with each loss: what the shared states leave open is all that stays."""
    forest = judged("flat", seed=5, num_trees=4, unjudged=0.0)
    for options in ({}, {"loss": "bce"}, {"loss": "hl_gauss"}):
        model = critic(**{"learning_rate": 5e-3, "num_minibatches": 2} | options)
        for _ in range(60):
            model.observe(forest)
        assert model.metrics["critic/explained_variance"] > 0.7, options
        assert model.metrics["critic/auc"] == 1.0


@pytest.mark.parametrize("backbone", ["own", "policy"])
def test_the_order_of_trees_and_the_cuts_change_nothing(backbone):
    forest = judged("deep", seed=7, num_trees=5)
    order = torch.tensor([3, 1, 4, 0, 2])
    mixed, tokens = forest.in_order(order), torch.arange(forest.num_tokens)
    place = forest.with_token(row=tokens).in_order(order).token["row"]
    models = [with_weights(critic(backbone=backbone, max_tokens=most)) for most in (4096, 4096, 16)]
    one, two, three = (model.observe(f) for model, f in zip(models, (forest, mixed, forest), strict=True))
    close(two.token["values"], one.token["values"][place], atol=1e-5, rtol=0)
    close(three.token["values"], one.token["values"], atol=1e-5, rtol=0)
    for other in models[1:]:
        assert other.metrics["critic/grad_norm"] == pytest.approx(models[0].metrics["critic/grad_norm"], rel=1e-4)
        for a, b in zip(weights(models[0]), weights(other), strict=True):
            assert float((a - b).abs().max()) < 2.1e-3  # AdamW's first step is a sign where the gradient is rounding
            assert float((a - b).abs().mean()) < 1e-4


@pytest.mark.parametrize("backbone", ["own", "policy"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_its_state_comes_back(backbone, family, tmp_path):
    """Optimiser, order of minibatches and weights: the next batch ends in the same bits."""
    forest = judged("deep", seed=4)
    one, two = (critic(family=family, backbone=backbone, num_minibatches=2) for _ in range(2))
    one.observe(forest)
    two.policy.load_state_dict(one.policy.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    if backbone == "own":
        found, expected = two.learner.tensors(fill=True), one.learner.tensors()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            tensor.copy_(expected[name])
    assert one.observe(forest).token["values"].equal(two.observe(forest).token["values"]) and same(one, two)


# ---------------------------------------------------------------------- where it lies


def test_on_the_policys_states_the_policy_stays():
    """The values are the head's of the policy's own states; nothing of the policy moves or gets a gradient."""
    forest, policy = judged("deep", seed=3), fresh("qwen3")
    model = with_weights(Critic(policy, CriticOptions(backbone="policy", learning_rate=1e-2), WHOLE))
    own = with_weights(critic(update="none")).observe(forest).token["values"]
    before = [value.detach().clone() for value in policy.parameters()]
    found = model.observe(forest)
    close(found.token["values"], own, atol=1e-5, rtol=0)
    assert all(a.equal(b) for a, b in zip(before, policy.parameters(), strict=True))
    assert all(value.grad is None for value in policy.parameters()) and model.trained is None
    assert model.observe(forest).token["values"].ne(found.token["values"]).any()


def test_with_adapters_these_and_the_head_alone_learn():
    policy = fresh("qwen3")
    add_adapters(policy, 2, 8.0, [], 0)
    model = Critic(policy, CriticOptions(learning_rate=1e-2), WHOLE)
    forest, before = judged("flat"), weights(model)
    for _ in range(2):
        model.observe(forest)
    learnt = {name for name, value in model.policy.named_parameters() if value.requires_grad}
    assert all("lora_" in name or name.startswith("heads.value") for name in learnt)
    base = dict(policy.named_parameters())
    for name, value in model.policy.named_parameters():
        if name not in learnt:
            assert value.data_ptr() == base[name].data_ptr()
    assert not all(a.equal(b) for a, b in zip(before, weights(model), strict=True))


def test_what_a_run_holds_for_it():
    def held(**given) -> list[tuple[str, str, bool]]:
        return [(load.name, load.model, load.learns) for load in models_beside(resolve({"algorithm": "ppo"} | given))]

    assert held() == [("critic", "embedded", True)]
    assert held(critic={"model": "other", "update": "none"}) == [("critic", "other", False)]
    assert held(critic={"backbone": "policy"}) == []
    assert ("critic", "embedded", True) in held(objective={"kl": {"estimator": "k1", "coef": 0.1}})


# ---------------------------------------------------------------------- measures and options


def test_measures_by_hand():
    """Returns 1, 1, 0, 0 and values 1, 1/2, 1/2, 0: half of the variance is left; means 3/4 and 1/4."""
    segments = [Segment([5, 6], reward=1.0), Segment([5, 6], reward=0.0)]
    forest = Forest.from_trees([Tree(Problem(), [1], segments)])
    returns, values = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.5, 0.5, 0.0])
    found = value_metrics(forest, values, returns)
    assert found["critic/explained_variance"] == pytest.approx(0.5) and found["critic/auc"] == 1.0
    assert found["critic/value"] == found["critic/return"] == 0.5
    assert value_metrics(forest, 1 - values, returns)["critic/auc"] == 0.0
    alike = forest.with_segment(reward=torch.ones(2))
    found = value_metrics(alike, values, torch.ones(4))
    assert not {"critic/auc", "critic/explained_variance"} & found.keys()
    assert value_metrics(forest.with_segment(mask=torch.zeros(2, dtype=torch.bool)), values, returns) == {}


def test_targets_and_advantages_have_the_same_options():
    given = {"gamma": 0.9, "bootstrap": "hold_last", "whiten_rewards": True}
    config = resolve({"algorithm": "ppo", "credit": given})
    assert returns_of(config) == Returns(0.9, 1.0, "hold_last", True)
    assert returns_of(resolve({"algorithm": "ppo_max"})) == Returns(1.0, 0.95)
    assert returns_of(resolve({"algorithm": "ppo", "credit": {"name": "gae", "lam": 1, "lam_policy": 0.5}})).lam == 1.0


def test_returns_that_a_probability_cannot_be_are_refused():
    forest = judged("flat", seed=1)
    with pytest.raises(UserError, match=r"tree 'flat-\d', segment \d has the return 2; critic.loss bce"):
        critic(loss="bce").observe(forest.with_segment(reward=2 * torch.ones(forest.num_segments)))
    bins = critic(loss="hl_gauss")
    bins.observe(forest.with_segment(reward=2 * torch.ones(forest.num_segments)))
    assert bins.metrics["critic/outside"] == 1.0


def test_what_is_not_finite_is_counted():
    forest, model = judged("flat", seed=5), critic()
    with torch.no_grad():
        next(model.policy.parameters()).fill_(torch.nan)
    model.observe(forest)
    assert model.metrics["critic/nonfinite"] == 1


REFUSED = [
    ({"clip": 0.2, "loss": "bce"}, "critic.clip goes with --critic.loss mse"),
    ({"low": 1.0, "high": 0.0}, "critic.low (1) must be below critic.high (0)"),
    ({"backbone": "policy", "model": "other"}, "critic.model: a critic on the policy's states"),
    ({"warmup": 120}, "critic.warmup 120 is not below train.iterations 120"),
    ({"update": "none"}, "critic.update none: the critic stays as it is, so it needs a --critic.model"),
    ({"update": "none", "model": "other", "warmup": 2}, "critic.update none"),
]


@pytest.mark.parametrize("given, words", REFUSED, ids=str)
def test_what_does_not_go_together_is_refused(given, words):
    with pytest.raises(UserError) as error:
        build_parts(resolve({"algorithm": "ppo", "critic": {"clip": 0.0} | given}))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_warm_up_of_the_rate_that_nobody_would_see_is_refused():
    given = {"algorithm": "ppo", "critic": {"warmup": 5}, "optim": {"warmup": 5}}
    with pytest.raises(UserError, match=r"optim\.warmup 5 would be over before the policy's first step"):
        build_parts(resolve(given))
    build_parts(resolve(given | {"optim": {"warmup": 6}}))


# ---------------------------------------------------------------------- runs


def test_it_is_saved_with_every_checkpoint(tmp_path, capsys):
    """A folder with its head, from which another run starts; a head of another kind is refused."""
    run = tmp_path / "run"
    assert train(run, algorithm="ppo", critic__num_minibatches=2, critic__learning_rate=1e-3, num_problems=0) == 0
    folder = run / "checkpoints" / "000002" / "values"
    rows = metrics(run)[1:]
    assert all({"critic/loss", "critic/explained_variance", "critic/grad_norm"} <= row.keys() for row in rows)
    saved = load_policy(str(folder), "cpu")
    assert saved.heads["value"].linear.weight.abs().max() > 0
    options = {"critic__model": str(folder), "critic__update": "none", "num_problems": 0, "iterations": 1}
    assert train(tmp_path / "two", algorithm="ppo", **options) == 0
    assert metrics(tmp_path / "two")[-1]["critic/value"] != 0
    bins = {"critic__model": str(folder), "critic__loss": "hl_gauss", "critic__clip": 0}
    assert train(tmp_path / "three", algorithm="ppo", **bins) == 2
    assert "critic.model: its value head gives 1 numbers" in capsys.readouterr().err
    logits = {"critic__model": str(folder), "critic__loss": "bce", "critic__clip": 0}
    assert train(tmp_path / "four", algorithm="ppo", **logits) == 2
    assert "for a state (value), and critic.loss bce needs 1 (logit of success)" in capsys.readouterr().err
    bare = {"critic__model": str(folder.parent), "critic__update": "none"}
    assert train(tmp_path / "five", algorithm="ppo", **bare) == 2
    assert "has no value head" in capsys.readouterr().err


def test_in_the_warm_up_the_policy_stays(tmp_path):
    """The first two of three iterations move the critic alone; the third moves both."""
    run = tmp_path / "run"
    options = {"critic__warmup": 2, "checkpoint__every": 1, "checkpoint__keep": 9, "iterations": 3, "num_problems": 0}
    assert train(run, algorithm="ppo", **options) == 0
    folders = [run / "checkpoints" / f"{number:06d}" for number in (1, 2, 3)]
    policies = [(folder / "model.safetensors").read_bytes() for folder in folders]
    critics = [(folder / "values" / "model.safetensors").read_bytes() for folder in folders]
    assert policies[0] == policies[1] != policies[2] and len(set(critics)) == 3
    assert [row.get("optim/held") for row in metrics(run)[1:]] == [1.0, 1.0, None]
    assert ["optim/grad_norm" in row for row in metrics(run)[1:]] == [False, False, True]


@pytest.mark.parametrize("backbone", ["own", "policy"])
def test_a_stop_between_the_critic_and_the_policy(tmp_path, monkeypatch, backbone):
    """Saved there, continued, and identical to a run that went through, to the last bit."""
    options = {"critic__backbone": backbone, "critic__num_minibatches": 2, "iterations": 3, "num_problems": 0}
    options |= {"credit__bootstrap": "value", "checkpoint__every": 1, "checkpoint__keep": 9, "critic__warmup": 1}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(whole, algorithm="ppo", **options) == 0
    observe = Critic.observe

    def stopping(self, forest):
        found = observe(self, forest)
        if self.batches == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Critic, "observe", stopping)
        assert train(run, algorithm="ppo", **options) == 130
    stopped = newest_checkpoint(run)
    assert stopped is not None and stopped.name == "000001.000"
    assert main(["train", "--resume", str(run)]) == 0
    one, two = (folder / "checkpoints" / "000003" for folder in (whole, run))
    names = ["model.safetensors"] + (
        ["values/model.safetensors", "values/heads.safetensors"] if backbone == "own" else []
    )
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    states = [load_checkpoint(folder)["models"]["values"] for folder in (one, two)]
    assert states[0]["batches"] == states[1]["batches"] == 3
    if backbone == "policy":
        heads = [state["head"] for state in states]
        assert heads[0]["linear.weight"].equal(heads[1]["linear.weight"]) and heads[0]["linear.weight"].any()
    apart = [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens/per_second"}
        for row in metrics(whole)
    ]
    again = [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens/per_second"} for row in metrics(run)
    ]
    assert apart == again


@pytest.mark.parametrize("growth", [{}, {"growth__name": "tree", "growth__num_branches": 3, "growth__depth": 2}])
@pytest.mark.parametrize("loss", ["bce", "hl_gauss"])
def test_runs_with_other_losses_and_trees(tmp_path, growth, loss):
    """With a penalty in the reward where the loss takes it."""
    options = {"critic__loss": loss, "critic__clip": 0, "iterations": 2, "num_problems": 0, "temperature": 1} | growth
    if growth:
        options |= {"growth__step__tokens": 8, "growth__group_size": 8}
    if loss == "hl_gauss":
        options |= {"objective__kl__estimator": "k1", "objective__kl__coef": 0.1, "credit__bootstrap": "hold_last"}
    assert train(tmp_path / "run", algorithm="ppo", **options) == 0
    row = metrics(tmp_path / "run")[-1]
    assert row["optim/grad_norm"] > 0 and ("critic/outside" in row) == (loss == "hl_gauss")

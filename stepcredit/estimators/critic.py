"""The critic: values of the states before tokens, learnt from the returns of the same rollouts (PPO)."""

import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stepcredit.config import Config
from stepcredit.credit import needs_of
from stepcredit.credit.choose import terms_of
from stepcredit.credit.gae import Returns, cut_off
from stepcredit.credit.sum import Term
from stepcredit.errors import UserError
from stepcredit.estimators.base import Context, Estimator, Load, Passes, provider
from stepcredit.estimators.critic_head import HeadLearner
from stepcredit.estimators.measures import value_metrics
from stepcredit.estimators.options import CriticOptions
from stepcredit.estimators.value_losses import value_form
from stepcredit.forest import Forest
from stepcredit.forest.types import Segment
from stepcredit.learn.adapters import trainable_copy
from stepcredit.learn.learner import Learner
from stepcredit.learn.loading import adapt
from stepcredit.learn.placement import UNSHARDED, Placement
from stepcredit.policy.batching import with_source
from stepcredit.policy.forward import Policy
from stepcredit.policy.heads import HeadForm, add_head, form_of
from stepcredit.seeds import CRITIC, generator, mixed

HEAD = "value"

log = logging.getLogger("stepcredit")


class Critic(Estimator):
    """Adds `values`, of the state before each sampled token, and `value_target`, which it learns.

    The target is the lambda-return under the values of before the batch (`credit.gae.Returns`). The loss is the mean
    over active tokens (judged, sampled, not masked), each token of a tree once, divided by nothing else: TRL's and
    verl's losses are means over tokens, too, and TRL adds a tenth of it to the policy's loss.

    All values are those of the critic before the batch trains it. Where the targets do not depend on them (lam 1, no
    bootstrap) and there is one optimiser step, they are by-products of the pass that trains it; otherwise a scoring
    pass comes first. With bootstrap "value" this pass also adds `value_after`, the value of the state behind the last
    token of each completion that was cut off, at that token.

    With `backbone` "policy" the critic is a head on the policy's states, before its update, and nothing of the policy
    learns from it.

    Args:
        policy: what it starts from; a copy is trained, in fp32. With `backbone` "policy" the policy itself.
        returns: what the targets are made of.
        max_tokens: token positions of a micro-batch.
        seed: of the order of the minibatches.
        placement: how it lies on several processes.
    """

    def __init__(
        self,
        policy: Policy,
        options: CriticOptions,
        returns: Returns,
        max_tokens: int = 16384,
        seed: int = 0,
        placement: Placement = UNSHARDED,
    ) -> None:
        super().__init__()
        self.options, self.returns, self.seed = options, returns, seed
        self.form = value_form(options)
        self.batches = 0
        self.learner: Learner | HeadLearner
        if options.backbone == "policy":
            self.policy = policy
            self.learner = HeadLearner(policy, self.form.outputs, placement, options, max_tokens)
            return
        own = trainable_copy(policy, share_frozen=True, until_sharded=placement.sharded)
        _give_head(own, HeadForm(self.form.outputs, self.form.kind), options)
        self.policy = placement.place(own)
        self.learner = self.trained = Learner(self.policy, placement, options, max_tokens, " in the critic")

    @property
    def holds_policy(self) -> bool:  # type: ignore[override]
        """Whether the last batch was one of the warm-up."""
        return self.batches <= self.options.warmup

    def observe(self, forest: Forest) -> Forest:
        """
        Raises:
            UserError: a target that the loss cannot learn, or the memory does not hold a completion.
        """
        forest = forest.without_token("values", "value_target", "value_after")
        self.metrics = {}
        steps = self.options.num_epochs * self.options.num_minibatches
        learns = self.options.update != "none"
        if self.returns.reads_values or steps > 1 or not learns:
            forest = self._with_values(forest)
        forest = self._with_target(forest)
        if learns:
            forest = self._learn(forest)
        self.batches += 1
        whole = replace(self.returns, lam=1.0, bootstrap="zero")
        returns = whole.of(forest, forest.token["values"]).float()
        self.metrics |= value_metrics(forest, forest.token["values"], returns)
        return forest

    def state_dict(self) -> dict[str, Any]:
        own = self.learner.state_dict() if isinstance(self.learner, HeadLearner) else {}
        return {"batches": self.batches, "max_tokens": self.learner.max_tokens} | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]
        self.learner.max_tokens = min(self.learner.max_tokens, state["max_tokens"])
        if isinstance(self.learner, HeadLearner):
            self.learner.load_state_dict(state)

    # ------------------------------------------------------------------ values

    def _with_values(self, forest: Forest) -> Forest:
        """The forest with `values`, and with bootstrap "value" `value_after`, by a pass without gradients."""
        cut = cut_off(forest)
        if self.returns.bootstrap != "value":
            return forest.with_token(values=self._score(forest))
        if not bool(cut.any()):
            return forest.with_token(values=self._score(forest), value_after=torch.zeros(forest.num_tokens))
        longer, added = _one_token_more(forest, cut)
        values = self._score(longer)
        last = (forest.segment["start"] + forest.segment["length"] - 1)[cut]
        after = torch.zeros(forest.num_tokens).index_copy_(0, last, values[added])
        return forest.with_token(values=values[~added], value_after=after)

    @torch.no_grad()
    def _score(self, forest: Forest) -> Tensor:
        """[num_tokens] the values of a forest, part by part."""
        parts = self.policy.parts(forest, self.learner.max_tokens)
        with self.policy.ranks.name_missing():
            pieces = [self._decoded(part, self._outputs(part)) for part in parts]
        return self.policy.collect(forest, parts, pieces)

    def _outputs(self, part: Forest) -> Tensor:
        call = self.learner.outputs if isinstance(self.learner, HeadLearner) else self.policy
        found: Tensor = call(part, head=HEAD)
        return found

    def _decoded(self, part: Forest, outputs: Tensor) -> Tensor:
        """Values of outputs; 0 for tokens that were not sampled."""
        return torch.where(part.token_sampled.to(outputs.device), self.form.decode(outputs.detach()), 0.0)

    # ------------------------------------------------------------------ learning

    def _with_target(self, forest: Forest) -> Forest:
        """The forest with `value_target`; without `values` yet where these do not matter."""
        values = forest.token["values"] if "values" in forest.token else torch.zeros(forest.num_tokens)
        target = self.returns.of(forest, values).float()
        low, high = self.form.range
        outside = self._counted(forest) & ((target < low - 1e-6) | (target > high + 1e-6))
        if self.form.bounded and bool(outside.any()):
            index = int(outside.nonzero()[0])
            raise UserError(
                f"{forest.describe_segment(int(forest.token['segment'][index]))} has the return "
                f"{float(target[index]):.4g}; critic.loss bce learns returns in [0, 1]. Scale the reward functions "
                "with --reward.weights, take no k1 penalty and no --credit.bootstrap, or another --critic.loss"
            )
        if math.isfinite(high - low) and not self.form.bounded:
            self.metrics["critic/outside"] = float(outside.sum() / forest.usable.sum().clamp(min=1))
        return forest.with_token(value_target=target)

    def _counted(self, forest: Forest) -> Tensor:
        """[num_tokens] the tokens that it learns from."""
        if self.options.learn_from == "finished":  # of earlier windows, too
            return forest.usable & _finished(forest)
        return forest.active

    def _learn(self, forest: Forest) -> Forest:
        """The optimiser steps of a batch; adds the values of the only one where there are none yet."""
        counted = self._counted(forest)
        whole = with_source(forest.with_token(counted=counted))
        if "past" in forest.segment and "values" in forest.token:  # in a window few completions end
            ends = torch.zeros(forest.num_segments, dtype=torch.bool)
            ends[forest.token["segment"][counted]] = True
            whole = whole.select(ends)
            self.metrics["critic/learnt_from"] = float(counted.float().mean())
            if not whole.num_trees:
                return forest
        norms, losses, values = [], [], torch.zeros(forest.num_tokens)
        for step in self._minibatches(whole):
            count = int(step.token["counted"].sum())
            step = step.with_token(weights=step.token["counted"] / max(1, count))
            parts, results = self.learner.accumulate(step, self._loss)
            values[step.token["source"]] = self.policy.collect(step, parts, [value for value, _ in results])
            losses.append(sum(self.policy.ranks.gather(float(torch.stack([loss for _, loss in results]).sum()))))
            norm, _ = self.learner.step(loss_is_valid=count > 0)
            norms.append(norm)
        self.metrics["critic/loss"] = sum(losses) / len(losses)
        self.metrics["critic/grad_norm"] = sum(norms) / len(norms)
        self.metrics["critic/nonfinite"] = sum(not math.isfinite(norm) for norm in norms) / len(norms)
        return forest if "values" in forest.token else forest.with_token(values=values)

    def _loss(self, part: Forest, call: Callable[..., Any]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of a part, with its values and without gradient."""
        outputs: Tensor = call(part, head=HEAD)
        values = self._decoded(part, outputs)
        old = part.token["values"].to(values.device) if "values" in part.token else values
        weights = (part.token["weights"] * part.token["owned"]).to(values.device)
        per_token = self.form.loss(outputs, part.token["value_target"].to(values.device), old)
        loss = (weights * torch.where(weights > 0, per_token, 0.0)).sum()
        return loss, (values, loss.detach())

    def _minibatches(self, forest: Forest) -> Iterator[Forest]:
        for epoch in range(self.options.num_epochs):
            if self.options.num_minibatches == 1:
                yield forest
                continue
            shuffle = generator(mixed(self.seed, CRITIC, self.batches, epoch))
            order = torch.from_numpy(shuffle.permutation(forest.num_trees))
            for trees in order.tensor_split(self.options.num_minibatches):
                if len(trees):
                    yield forest.select_trees(trees)


def _finished(forest: Forest) -> Tensor:
    """[num_tokens] False for tokens that lead to cut-off completions alone."""
    ended = forest.segment["is_leaf"] & forest.judged & ~cut_off(forest)
    for level in forest.levels_deepest_first():
        ended[forest.segment["parent"][level[ended[level]]]] = True
    return ended[forest.token["segment"]]


def _one_token_more(forest: Forest, leaves: Tensor) -> tuple[Forest, Tensor]:
    """The forest with a token more behind these leaves (bool), and which tokens these are; in the order of the leaves.

    Its value is that of the state behind the leaf, which what token it is does not change.
    """
    bare = forest.without_token(*(name for name in forest.token if name not in ("token_ids", "segment", "position")))
    trees, bounds = bare.to_trees(), forest.segment["tree"].bincount(minlength=forest.num_trees).cumsum(0).tolist()
    before = [tree.segments[:] for tree in trees]
    for leaf in leaves.nonzero().squeeze(1).tolist():
        number = int(forest.segment["tree"][leaf])
        index = leaf - (bounds[number - 1] if number else 0)
        own = trees[number].segments
        own[index].reward, own[index].finish = None, "cut"
        own.append(Segment([int(own[index].token_ids[-1])], index))
    added = [index >= len(old) for tree, old in zip(trees, before, strict=True) for index in range(len(tree.segments))]
    longer = Forest.from_trees(trees)
    return longer, torch.tensor(added)[longer.token["segment"]]


def _give_head(policy: Policy, form: HeadForm, options: CriticOptions) -> None:
    """A head for the values, unless the model brings one; and no gradient for an output layer that nothing reads."""
    if HEAD not in policy.heads:
        if options.model is not None:
            where = (
                f"critic.model: '{options.model}' has no value head (that of another run is in checkpoints/N/values)"
            )
            if options.update == "none":
                raise UserError(f"{where}, and with --critic.update none it would never say anything")
            log.warning("%s; it begins with zeros", where)
        add_head(policy, HEAD, *form)
    elif (own := form_of(policy, HEAD)) != form:
        kind = f" ({own.kind})" if own.kind else ""
        raise UserError(
            f"critic.model: its value head gives {own.outputs} numbers for a state{kind}, and critic.loss "
            f"{options.loss} needs {form.outputs} ({form.kind}); take the options with which it was trained"
        )
    policy.heads.requires_grad_(True)
    output = policy.model.get_output_embeddings().weight
    if output is not policy.model.get_input_embeddings().weight:
        output.requires_grad_(False)


# ---------------------------------------------------------------------- in a run


def _needs(config: Config, needed: Collection[str]) -> Iterator[str]:
    """The rewards that its targets are made of, after refusing what does not go together."""
    given = config.critic
    if given.clip and given.loss != "mse":
        raise UserError(f"critic.clip goes with --critic.loss mse, not with {given.loss}; add --critic.clip 0")
    if given.low >= given.high:
        raise UserError(f"critic.low ({given.low:g}) must be below critic.high ({given.high:g})")
    if given.backbone == "policy" and given.model is not None:
        raise UserError(
            "critic.model: a critic on the policy's states (critic.backbone policy) has no model; leave it out"
        )
    if given.warmup and given.warmup >= config.train.iterations:
        raise UserError(
            f"critic.warmup {given.warmup} is not below train.iterations {config.train.iterations}: the policy would "
            "learn nothing"
        )
    if given.update == "none" and (given.model is None or given.warmup):
        raise UserError(
            "critic.update none: the critic stays as it is, so it needs a --critic.model that has learnt, and no "
            "--critic.warmup"
        )
    if 0 < config.optim.warmup <= given.warmup:
        raise UserError(
            f"optim.warmup {config.optim.warmup} would be over before the policy's first step, after critic.warmup "
            f"{given.warmup}; make it longer, or 0"
        )
    if "token_rewards" in needed:
        yield "token_rewards"


def _loads(config: Config, needed: Collection[str]) -> Iterator[Load]:
    given = config.critic
    if given.backbone == "own":
        yield Load("critic", given.model or config.model, given.update != "none", adapted=True)


def _passes(config: Config, needed: Collection[str]) -> Passes:
    """As `Critic.observe` makes them; a head on the policy's states has no backward of a model."""
    given = config.critic
    learns, steps = given.update != "none", given.num_epochs * given.num_minibatches
    first = returns_of(config).reads_values or steps > 1 or not learns
    epochs = given.num_epochs if learns else 0
    return Passes(int(first) + epochs, epochs if given.backbone == "own" else 0)


@provider(needs=_needs, loads=_loads, passes=_passes)
def critic(context: Context) -> Critic:
    """A critic for the credit function of the run, whose options say what its targets are."""
    config, given = context.config, context.config.critic
    start = context.policy
    if given.model is not None:
        start = context.load(given.model, "critic.model")
        adapt(config, start)
    budget = config.optim.max_tokens_per_micro_batch
    return Critic(start, given, returns_of(config), budget, config.train.seed, context.placement)


def returns_of(config: Config) -> Returns:
    """What the credit function that reads the values says of returns, so that targets and advantages agree.

    Raises:
        UserError: several terms of a sum read them and want different targets.
    """
    terms = terms_of(config.credit)
    readers = [term for term in terms if "values" in needs_of(term.function).columns] or terms[:1]
    wanted = {term.option: _returns(term) for term in readers}
    if len(set(wanted.values())) > 1:
        raise UserError(f"{', '.join(wanted)}: the critic that they read learns one kind of returns; give all the same")
    return next(iter(wanted.values()))


def _returns(term: Term) -> Returns:
    parameters = inspect.signature(term.function).parameters
    given = {}
    for name, default in vars(Returns()).items():
        known = parameters[name].default if name in parameters else default
        given[name] = type(default)(term.options.get(name, known))
    return Returns(**given)

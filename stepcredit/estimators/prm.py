"""The implicit process reward model, learnt online from outcomes alone (PRIME, arXiv 2502.01456)."""

import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from stepcredit.config import Config
from stepcredit.credit import needs_of
from stepcredit.credit.choose import terms_of
from stepcredit.credit.sum import Term
from stepcredit.errors import UserError
from stepcredit.estimators.base import Context, Estimator, Load, Passes, provider
from stepcredit.estimators.measures import area_under_curve
from stepcredit.estimators.options import PRMOptions
from stepcredit.forest import Forest
from stepcredit.learn.adapters import trainable_copy
from stepcredit.learn.learner import Learner, ScoreFunction
from stepcredit.learn.loading import adapt
from stepcredit.learn.placement import UNSHARDED, Placement
from stepcredit.policy.batching import with_source
from stepcredit.policy.forward import Policy, score
from stepcredit.seeds import REWARD_MODEL, generator, mixed

log = logging.getLogger("stepcredit")

BETA = 0.05  # of the paper
BINS = 10  # of predicted chances, for the calibration error


class ImplicitPRM(Estimator):
    """Adds `prm_logprobs`, the model's own at temperature 1, and trains it on the outcomes.

    A completion y is predicted to be right with chance sigmoid(beta * sum_t (log pi_prm(y_t) - log pi_ref(y_t))), the
    sum over its sampled tokens; the loss is the cross-entropy with its outcome (a fraction is one too), the mean over
    the judged completions of a minibatch that no shaper masks. Partial sums are values, so each token's term is its
    process reward.

    In "after", all rewards come from the model as it was before the batch. With one minibatch they are by-products of
    the pass that trains it, so nothing is computed twice; with several a scoring pass comes first (the released code
    takes those of the training passes, the later ones of a model that has seen a part of the batch). The metrics are of
    the model as it was before the batch, whatever the update.

    Under `options.update` "after", rewards are those of the model before this batch trains it (the paper's single
    forward); under "before" it is trained first, then gives the rewards (double forward); under "none" it is not.

    Args:
        policy: what it starts from; a copy is trained, in fp32.
        beta: scale of the log-ratio.
        max_tokens: token positions of a micro-batch.
        seed: of the order of the minibatches.
        placement: how it lies on several processes.
    """

    def __init__(
        self,
        policy: Policy,
        options: PRMOptions,
        beta: float = BETA,
        max_tokens: int = 16384,
        seed: int = 0,
        placement: Placement = UNSHARDED,
    ) -> None:
        super().__init__()
        own = trainable_copy(policy, share_frozen=True, until_sharded=placement.sharded)
        self.policy, self.options = placement.place(own), options
        self.beta, self.seed = beta, seed
        where = " in the process reward model"
        self.learner = self.trained = Learner(self.policy, placement, options, max_tokens, where)
        self.batches = 0

    def observe(self, forest: Forest) -> Forest:
        """Flat forests with `ref_logprobs`, at temperature 1, and rewards in [0, 1].

        Raises:
            UserError: a reward outside [0, 1], or the memory does not hold a completion.
        """
        observed = self._observe(forest, self.options.update)
        self.batches += 1
        return observed

    def judge(self, forest: Forest) -> Forest:
        """`observe` without learning from the forest, whatever the options say."""
        return self._observe(forest, "none")

    def _observe(self, forest: Forest, update: str) -> Forest:
        forest.require_flat("the process reward model")
        outcome = _outcomes(forest)
        first = None
        if update == "none" or self.options.num_minibatches > 1:
            first = self._score(forest)
        self.metrics = {}
        if update != "none":
            learnt = self._learn(forest, outcome)
            first = learnt if first is None else first
        assert first is not None
        leaf, label = outcome
        logit = self.beta * sums(forest, first - forest.token["ref_logprobs"])[leaf]
        self.metrics |= prediction_metrics(logit, label)
        return forest.with_token(prm_logprobs=self._score(forest) if update == "before" else first)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "max_tokens": self.learner.max_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]
        self.learner.max_tokens = min(self.learner.max_tokens, state["max_tokens"])

    def _score(self, forest: Forest) -> Tensor:
        return score(self.policy, forest, 1.0, self.learner.max_tokens).logprobs

    def _learn(self, forest: Forest, outcome: tuple[Tensor, Tensor]) -> Tensor:
        """One optimiser step a minibatch; each token's log-probability as it was before its own minibatch."""
        label = torch.full((forest.num_segments,), torch.nan).index_copy_(0, *outcome)
        forest = with_source(forest.with_segment(label=label))
        logprobs, norms = torch.zeros(forest.num_tokens), []
        for step in self._minibatches(forest):
            judged = int((~step.segment["label"].isnan()).sum())

            def loss(part: Forest, call: ScoreFunction, judged: int = judged) -> tuple[Tensor, Tensor]:
                scores = call(part, 1.0)
                return self._loss(part, scores.logprobs) / max(1, judged), scores.logprobs.detach()

            parts, pieces = self.learner.accumulate(step, loss)
            logprobs[step.token["source"]] = self.policy.collect(step, parts, pieces)
            norm, _ = self.learner.step(loss_is_valid=judged > 0)
            norms.append(norm)
        self.metrics["prm/grad_norm"] = sum(norms) / len(norms)
        self.metrics["prm/nonfinite"] = sum(not math.isfinite(norm) for norm in norms) / len(norms)
        return logprobs

    def _loss(self, part: Forest, logprobs: Tensor) -> Tensor:
        """Sum of the cross-entropies of a part's judged completions."""
        owned = torch.zeros(part.num_segments, dtype=torch.bool)
        owned[part.token["segment"][part.token["owned"]]] = True
        rows = (owned & ~part.segment["label"].isnan()).nonzero().squeeze(1)
        total = sums(part, logprobs - part.token["ref_logprobs"].to(logprobs.device))[rows.to(logprobs.device)]
        label = part.segment["label"][rows].to(logprobs.device)
        return binary_cross_entropy_with_logits(self.beta * total, label, reduction="sum")

    def _minibatches(self, forest: Forest) -> Iterator[Forest]:
        shuffle = generator(mixed(self.seed, REWARD_MODEL, self.batches))
        order = torch.from_numpy(shuffle.permutation(forest.num_trees))
        for trees in order.tensor_split(self.options.num_minibatches):
            if len(trees):
                yield forest.select_trees(trees)


def _needs(config: Config, needed: Collection[str]) -> Iterator[str]:
    """Its reference, after refusing what would give `ref_logprobs` two meanings, and two betas."""
    prm_beta(config)
    other_temperature = config.sampler.temperature != 1
    own = config.prm.reference == "policy"
    if own and other_temperature:
        raise UserError("prm.reference: policy needs --sampler.temperature 1, as the process reward model has")
    if config.objective.kl.coef and (other_temperature or config.prm.model or own):
        raise UserError(
            "objective.kl.coef: the KL term would need another reference than the process reward model; leave it 0, or "
            "take --sampler.temperature 1, no --prm.model and --prm.reference start"
        )
    yield "ref_logprobs"


def _loads(config: Config, needed: Collection[str]) -> Iterator[Load]:
    yield Load("reward model", config.prm.model or config.model, config.prm.update != "none", adapted=True)


def _passes(config: Config, needed: Collection[str]) -> Passes:
    """As `ImplicitPRM.observe` makes them."""
    given = config.prm
    learns = given.update != "none"
    first = not learns or given.num_minibatches > 1
    return Passes(int(first) + int(learns) + int(given.update == "before"), int(learns))


@provider(needs=_needs, loads=_loads, passes=_passes)
def implicit_prm(context: Context) -> ImplicitPRM:
    config, start = context.config, context.prm_start
    if start is not context.policy:
        adapt(config, start)
    budget = config.optim.max_tokens_per_micro_batch
    return ImplicitPRM(start, config.prm, prm_beta(config), budget, config.train.seed, context.placement)


def prm_beta(config: Config) -> float:
    """That of the credit function, so that rewards and loss have one scale; of a sum that of the term that reads them.

    Raises:
        UserError: there are several, and they differ.
    """
    terms = terms_of(config.credit)
    readers = [term for term in terms if "prm_logprobs" in needs_of(term.function).columns] or terms[:1]
    betas = {f"{term.option}.beta": _beta(term) for term in (terms if len(terms) == 1 else readers)}
    if len(set(betas.values())) > 1:
        each = ", ".join(f"{option} {beta:g}" for option, beta in betas.items())
        raise UserError(f"{each}: the process reward model that they read has one beta; give all the same")
    return next(iter(betas.values()))


def _beta(term: Term) -> float:
    return beta_of(term.function, term.options)


def beta_of(function: Callable[..., Any], options: Mapping[str, Any]) -> float:
    """That of a credit function with these options, its default included; the paper's for one that has none."""
    parameter = inspect.signature(function).parameters.get("beta")
    default = parameter.default if parameter and isinstance(parameter.default, (int, float)) else BETA
    return float(options.get("beta", default))


def sums(forest: Forest, values: Tensor) -> Tensor:
    """[num_segments] sum of `values` over the sampled tokens of each completion, at its leaf."""
    leaf = forest.leaf[forest.token["segment"]].to(values.device)
    counted = torch.where(forest.token_sampled.to(values.device), values, 0.0)
    return values.new_zeros(forest.num_segments).index_add(0, leaf, counted)


def _outcomes(forest: Forest) -> tuple[Tensor, Tensor]:
    """Judged leaves that are not masked, and their rewards."""
    leaf = (forest.segment["is_leaf"] & forest.segment["has_reward"] & forest.segment["mask"]).nonzero().squeeze(1)
    label = forest.segment["reward"][leaf]
    outside = ((label < 0) | (label > 1)).nonzero()
    if len(outside):
        index = int(leaf[outside[0]])
        raise UserError(
            f"{forest.describe_segment(index)} has the reward {float(label[outside[0]]):.4g}; the process reward model "
            "learns from outcomes in [0, 1]. Scale the reward functions with --reward.weights"
        )
    return leaf, label


def prediction_metrics(logit: Tensor, label: Tensor) -> dict[str, float]:
    """How well predictions fit outcomes; an outcome of at least 1/2 counts as right.

    `prm/loss` is the cross-entropy, `prm/accuracy` the share on the right side of 1/2, `prm/auc` the chance that a
    right completion is given more than a wrong one (ties count half; absent when all are alike), `prm/calibration` the
    mean distance of chance and outcome over ten bins of chances, weighted by their sizes.

    Args:
        logit: [n] of the chances; rows where it is not finite are left out.

    >>> found = prediction_metrics(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0]))
    >>> found["prm/auc"], round(found["prm/accuracy"], 3)
    (1.0, 0.667)
    """
    finite = logit.isfinite()
    logit, label = logit[finite], label[finite]
    if not len(label):
        return {}
    right, chance = label >= 0.5, logit.sigmoid()
    bins = (chance * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS).index_add(0, bins, chance - label).abs().sum() / len(label)
    found = {
        "prm/loss": float(binary_cross_entropy_with_logits(logit, label)),
        "prm/accuracy": float(((logit >= 0) == right).float().mean()),
        "prm/calibration": float(gap),
    }
    if bool(right.any()) and not bool(right.all()):
        found["prm/auc"] = area_under_curve(logit, right)
    return found

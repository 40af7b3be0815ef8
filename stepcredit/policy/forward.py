"""`Policy`: a causal language model that scores forests, each token computed once.

A forest is one row of tokens (`Packing`) whose attention follows the trees (`ForestPlan`), so a part of a batch is one
forward call of the model whatever its shape, and one call of the policy, head included, because FSDP2 acts on module
calls. Models for which that does not hold are scored in another way (`reference`), which `choose_scoring_form`
finds out.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from stepcredit.errors import UserError
from stepcredit.forest import Forest
from stepcredit.forest.ops import TokenScores
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy.agreement import difference_in_training, try_kernels
from stepcredit.policy.attention import FOREST, AttentionPlan, ForestPlan
from stepcredit.policy.batching import PREFERRED_TOKENS_ON_CPU, gather_owned, split_into_parts, tree_sizes, unowned_part
from stepcredit.policy.head import LogitRule, score_states
from stepcredit.policy.limits import check_positions, check_token_ids, positions_of, steady_length, vocabulary_of
from stepcredit.policy.packing import Packing
from stepcredit.policy.reference import CachedForm, plain_scores, plain_states
from stepcredit.policy.transfer import send
from stepcredit.processes.ranks import SINGLE_PROCESS, Ranks, balanced_shares

log = logging.getLogger("stepcredit")

ScoringForm = Literal["forest", "cached", "plain"]

LOGPROBS, STATES = "logprobs", "states"  # outputs of a policy beside its heads


class Policy(nn.Module):
    """A causal language model with its tokenizer, scoring forests.

    Args:
        model: any transformers causal language model.
        tokenizer: its tokenizer.
        autocast: compute in this type by autocast (weights keep theirs); None computes in the weights' type.
        scoring_form: "forest" (one packed row), "cached" (level by level) or "plain" (one row per completion).

    Attributes:
        heads: further heads beside the output layer, by name: modules from states [n, hidden] to [n]. They are trained
            and saved with the model. Some give a few numbers, [n, numbers].
        ranks: the processes over which scoring is distributed.
        compute_device: where that is not the device of its weights.
        rope_limit: tokens of a row up to which the rotary embedding is always the same; None: all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        autocast: torch.dtype | None = None,
        scoring_form: ScoringForm = "forest",
    ) -> None:
        super().__init__()
        self.model = model.eval()  # no dropout: sampling and scoring must agree
        self.tokenizer = tokenizer
        self.heads = nn.ModuleDict()
        self.ranks: Ranks = SINGLE_PROCESS
        self.compute_device: torch.device | None = None
        self.autocast = autocast
        self.logit_rule = LogitRule.of(model.config.get_text_config())
        self.rope_limit = steady_length(model.config.get_text_config())
        self.positions, self.vocabulary = positions_of(model), vocabulary_of(model)
        self._ordinary = model.config._attn_implementation
        self._checkpointed: list[GradientCheckpointingLayer] = []
        self.scoring_form = scoring_form

    @property
    def scoring_form(self) -> ScoringForm:
        """How forests are scored; setting it sets the model's attention function."""
        return self._scoring_form

    @scoring_form.setter
    def scoring_form(self, form: ScoringForm) -> None:
        self._scoring_form = form
        self.model.config._attn_implementation = FOREST if form == "forest" else self._ordinary

    @property
    def device(self) -> torch.device:
        return self.compute_device or next(self.model.parameters()).device

    @property
    def stop_token_ids(self) -> list[int]:
        """Stop ids of the model's generation config, else of the tokenizer."""
        config = self.model.generation_config
        ids = config.eos_token_id if config is not None else None
        if ids is None:
            ids = self.tokenizer.eos_token_id
        if ids is None:
            return []
        return [ids] if isinstance(ids, int) else list(ids)

    def autocast_context(self) -> Any:
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    def forward(
        self, forest: Forest, temperature: float = 1.0, entropy_grad: bool = False, head: str = LOGPROBS
    ) -> Any:
        """The output of a head for every token, given the tokens before it on its path.

        Args:
            forest: any shape, any lengths. With a column `token["owned"]` only the owned tokens are scored.
            temperature: of the distribution softmax(logits / temperature).
            entropy_grad: let gradients flow through the entropies.
            head: "logprobs", "states", or one of `heads`.

        Returns:
            For "logprobs" `TokenScores`: each token's log-probability and the entropy of the distribution it was drawn
            from; for another head one number for each token, or a few, computed from the state before it; for "states"
            that state. Each is [num_tokens] or [num_tokens, numbers], fp32 on the model's device; 0 for tokens that
            were not sampled and for those that are not owned.
        """
        prompt_length = forest.tree["prompt_length"]
        empty = (prompt_length == 0).nonzero()
        if len(empty):
            raise UserError(f"tree '{forest.problems[int(empty[0])].id}' has no prompt tokens to go on from")
        self.check_length(int(forest.path_length.max()))
        for ids in (forest.prompt_ids, forest.token["token_ids"]):
            if len(ids):
                check_token_ids([int(ids.min()), int(ids.max())], self.vocabulary, "a row that is scored")
        wanted = forest.token_sampled
        if "owned" in forest.token:
            wanted = wanted & forest.token["owned"]
        with self.autocast_context(), self._checkpointing():
            if head == LOGPROBS:
                scores, order = self._logprobs(forest, wanted, temperature, entropy_grad)
                return TokenScores(*(_scatter(order, value, forest.num_tokens) for value in scores))
            states, order, _ = self._states(forest, wanted)
            return _scatter(order, states if head == STATES else self.heads[head](states), forest.num_tokens)

    def _logprobs(
        self, forest: Forest, wanted: Tensor, temperature: float, entropy_grad: bool
    ) -> tuple[TokenScores, Tensor]:
        if self.scoring_form == "plain":
            scores, order = plain_scores(self.model, forest, wanted, temperature, entropy_grad)
            return scores, order.to(self.device)
        states, order, targets = self._states(forest, wanted)
        output = self.model.get_output_embeddings()
        return score_states(
            states, targets, output, temperature, rule=self.logit_rule, entropy_grad=entropy_grad
        ), order

    def checkpoint_layers(self) -> None:
        """Gradient checkpointing: store only the inputs of the layers; the backward computes each layer again.

        Raises:
            UserError: the model does not support it.
        """
        self._checkpointed = [layer for layer in self.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if not self._checkpointed or self.scoring_form == "cached":
            what = "the layers of this model cannot be" if not self._checkpointed else "the cached form cannot be"
            raise UserError(f"train.gradient_checkpointing: {what} computed again; leave it out")
        for layer in self._checkpointed:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """transformers checkpoints layers that are in training mode; their submodules stay in evaluation mode."""
        layers = self._checkpointed if torch.is_grad_enabled() else []
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def check_length(self, longest: int) -> None:
        """Refuse paths that the model has no positions for, or whose rotary embedding depends on the other rows."""
        if self.positions.fixed:
            check_positions(self.positions, longest, "the longest prompt and completion")
        if self.rope_limit is not None and longest > self.rope_limit:
            raise UserError(
                f"this model's rotary embedding changes with the longest row of a call beyond {self.rope_limit} tokens,"
                f" so a path of {longest} has no log-probability of its own; lower --task.max-prompt-tokens or "
                "--sampler.max-new-tokens"
            )

    def parts(self, forest: Forest, max_tokens: int, whole_trees: bool = False) -> list[Forest]:
        """Split a forest into parts (`split_into_parts`) of at most `max_tokens` token positions each.

        On a CPU they are smaller: larger ones take more memory and save little. With several processes the parts are
        those of this process; all processes have equally many, so some of the parts own nothing.
        """
        shared = self.scoring_form != "plain"
        preferred_tokens = PREFERRED_TOKENS_ON_CPU if self.device.type == "cpu" else None
        if self.ranks.size == 1:
            return split_into_parts(forest, max_tokens, shared, None, preferred_tokens, whole_trees)
        trees = balanced_shares(tree_sizes(forest), self.ranks.size)[self.ranks.rank]
        parts = split_into_parts(forest, max_tokens, shared, trees, preferred_tokens, whole_trees)
        return parts + [unowned_part(forest)] * (max(self.ranks.gather(len(parts))) - len(parts))

    def collect(self, forest: Forest, parts: Sequence[Forest], values: Sequence[Tensor]) -> Tensor:
        """Per-token values of the parts of all processes, in the rows of the whole forest."""
        return self.ranks.sum(gather_owned(forest, parts, values))

    def num_positions(self, forest: Forest) -> int:
        """Token positions that the forward of a forest computes."""
        if self.scoring_form != "plain":
            # The packed form leaves out the last tokens of completions: no token follows that their states predict.
            left_out = int(forest.ends.sum()) if self.scoring_form == "forest" else 0
            return len(forest.prompt_ids) + forest.num_tokens - left_out
        return int(forest.ends.sum()) * int(forest.path_length.max())

    def _states(self, forest: Forest, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states that predict the wanted tokens [n, hidden], and the tokens' rows and ids [n], on the device."""
        token_ids = forest.token["token_ids"]
        if self.scoring_form == "forest":
            packing, before = Packing.of_forest(forest, self.device)
            order = wanted.nonzero().squeeze(1)
            before, order, targets = packing.send(before[order], order, token_ids[order])
            states = self.hidden(packing.token_ids[None], packing.position[None], ForestPlan(packing))[0]
            return states.index_select(0, before), order, targets
        if self.scoring_form == "plain":
            states, order = plain_states(self.model, forest, wanted)
        else:
            states, order = CachedForm(self.model).states(forest, wanted)
        order, targets = send([order, token_ids[order]], self.device)
        return states, order, targets

    def logits(self, states: Tensor) -> Tensor:
        """The model's logits of states, as its own forward would give them."""
        logits = self.model.get_output_embeddings()(states).float()
        if self.logit_rule.scale != 1.0:
            logits = logits * self.logit_rule.scale
        return logits if self.logit_rule.cap is None else self.logit_rule.cap * torch.tanh(logits / self.logit_rule.cap)

    def hidden(self, token_ids: Tensor, position: Tensor, plan: AttentionPlan) -> Tensor:
        """Last states [rows, length, hidden] of tokens whose attention follows a plan."""
        return self.model.base_model(
            input_ids=token_ids,
            position_ids=position,
            # transformers passes on a mask of four dimensions unchanged, and a plan does not read it.
            attention_mask=torch.zeros(1, 1, 1, 1, device=token_ids.device),
            use_cache=False,
            plan=plan,
        ).last_hidden_state


def _scatter(rows: Tensor, values: Tensor, size: int) -> Tensor:
    """[size, ...] fp32: `values` at `rows`, 0 elsewhere."""
    return values.new_zeros((size, *values.shape[1:]), dtype=torch.float32).index_copy(0, rows, values.float())


@torch.no_grad()
def score(policy: Policy, forest: Forest, temperature: float, max_tokens: int) -> TokenScores:
    """Score a whole forest without gradients, part by part; results on the CPU."""
    parts = policy.parts(forest, max_tokens)
    with policy.ranks.name_missing():
        scores = [policy(part, temperature) for part in parts]
    return TokenScores(
        policy.collect(forest, parts, [score.logprobs for score in scores]),
        policy.collect(forest, parts, [score.entropy for score in scores]),
    )


@torch.no_grad()
def choose_scoring_form(policy: Policy, tolerance: float = 1e-3, home: torch.device | None = None) -> float:
    """Compare the scoring forms with the model's own logits on a small random tree and take the fastest that agrees.

    They are compared in fp32, and then, with gradients, in the types of training (`agreement`). Sets
    `policy.scoring_form`. Where neither the packed nor the cached form gives the model's own logits (a cap or scale
    that its config does not name, attention of another kind), the plain form is taken and the log says so.

    Args:
        tolerance: of log-probabilities in fp32.
        home: the device that it will compute on, where that is not the device of its weights: there only the attention
            kernel is tried.

    Returns:
        The largest difference of log-probabilities of the chosen form in fp32; infinite for the plain form.
    """
    forest = random_forest(policy.model.get_input_embeddings().weight.shape[0])
    autocast, policy.autocast = policy.autocast, None
    if next(policy.model.parameters()).dtype != torch.float32:
        tolerance = max(tolerance, 0.1)
    try:
        policy.scoring_form = "plain"
        plain = policy(forest).logprobs
        for form in _forms_to_try(policy.model):
            try:
                policy.scoring_form, policy.autocast = form, None
                difference = float((policy(forest).logprobs - plain).abs().max())
                policy.autocast = autocast
                if not difference <= tolerance:
                    why = f"it differs from the model's own logits by {difference:.2g}"
                elif home is not None and home.type != policy.device.type:
                    why = ""
                    if form == "forest":
                        try_kernels(policy, home)
                else:
                    why = difference_in_training(policy, forest, form)
            except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                log.warning("the %s form does not run on this model (%s)", form, error)
                continue
            if not why:
                policy.scoring_form = form
                level = logging.INFO if form == "forest" else logging.WARNING  # the others take longer
                text = f"{form} form; within {difference:.1e} of the model's own logits"
                log.log(level, "scoring each token once (%s)%s", text, "" if form == "forest" else ", level by level")
                return difference
            log.warning("the %s form is not used: %s", form, why)
    finally:
        policy.autocast = autocast
    policy.scoring_form = "plain"
    log.warning("scoring one row per completion; prompts are computed again for every completion")
    return float("inf")


@torch.no_grad()
def check_causal(policy: Policy, where: str) -> None:
    """Refuse models whose tokens see those that come after them, such as BERT.

    Raises:
        UserError: it is one.
    """
    policy.scoring_form = "plain"
    last = policy.vocabulary - 1
    rows = torch.tensor([[0, last // 2, 0], [0, last // 2, last]], device=policy.device)
    first, second = policy.model(input_ids=rows).logits[:, 1].float()
    if float((first - second).abs().max()) > 1e-3 * float(first.std()):
        kind = policy.model.config.model_type
        raise UserError(
            f"{where} ({kind}) is no causal language model: its tokens see those that come after them; give one that is"
        )


def _forms_to_try(model: PreTrainedModel) -> list[ScoringForm]:
    """The forms to try. The cached one is wrong for sliding windows: padding after a prompt would shift them."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    window = any(kind != "full_attention" for kind in kinds) if kinds else bool(getattr(config, "sliding_window", None))
    return ["forest"] if window else ["forest", "cached"]


def random_forest(vocabulary: int, seed: int = 0) -> Forest:
    """A small random forest: ragged prompts, ragged children, three levels."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=generator).tolist()

    trees = [
        Tree(
            Problem(id="deep"),
            tokens(5),
            [
                Segment(tokens(4), finish="cut"),
                Segment(tokens(7)),
                Segment(tokens(3), parent=0, finish="cut"),
                Segment(tokens(6), parent=0),
                Segment(tokens(2), parent=2),
                Segment(tokens(5), parent=2),
            ],
        ),
        Tree(Problem(id="flat"), tokens(9), [Segment(tokens(1)), Segment(tokens(8))]),
    ]
    return Forest.from_trees(trees)

"""`Policy`: a causal language model that scores forests, each token computed once.

The forest form walks a forest from the prompts down. Every level attends to its parents' keys and values, kept in a
transformers `DynamicCache`; the first token of a segment is predicted by the last state of its parent. The plain form
gives every completion a row of its own; it is the reference, and the fallback for models whose caches cannot be
shared. Both are the `forward` of one module, because DDP and FSDP2 act on module calls.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from stepcredit.forest import Forest
from stepcredit.ops import TokenScores
from stepcredit.policy.batching import cut, gather_owned, length_buckets
from stepcredit.policy.head import score_logits, score_states
from stepcredit.types import Problem, Segment, Tree

log = logging.getLogger("stepcredit")

Path = Literal["forest", "plain"]
MAX_POSITIONS = 1 << 16  # token positions of one forward call inside a part


@dataclass
class _Rows:
    """Encoded rows that children can continue: prompts, or the segments of one bucket."""

    ids: list[int]  # tree rows for prompts, segment rows otherwise
    cache: DynamicCache
    mask: Tensor  # [rows, slots] 1 where the cache holds a real token
    position: Tensor  # [rows] tokens encoded so far
    state: Tensor  # [rows, hidden] state of the last token


class Policy(nn.Module):
    """A causal language model with its tokenizer, scoring forests.

    Args:
        model: any transformers causal language model.
        tokenizer: its tokenizer.
        autocast: compute in this type by autocast (weights keep theirs); None computes in the weights' type.
        path: "forest" (each token once) or "plain" (one row per completion, through the model's own head).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        autocast: torch.dtype | None = None,
        path: Path = "forest",
    ) -> None:
        super().__init__()
        self.model = model.eval()  # no dropout: sampling and scoring must agree
        self.tokenizer = tokenizer
        self.autocast = autocast
        self.path = path

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def stop_token_ids(self) -> list[int]:
        """Stop ids of the model's generation config, else of the tokenizer."""
        config = self.model.generation_config
        ids = config.eos_token_id if config is not None else None
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    def autocast_context(self) -> Any:
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    def forward(self, forest: Forest, temperature: float = 1.0, entropy_grad: bool = False) -> TokenScores:
        """Log-probability of every token given the tokens before it on its path, and the entropy it was drawn from.

        Args:
            forest: any shape, any lengths.
            temperature: of the distribution softmax(logits / temperature).
            entropy_grad: let gradients flow through the entropies.

        Returns:
            `logprobs` and `entropy`, each [num_tokens] fp32 on the model's device; 0 for tokens that were not sampled.
        """
        with self.autocast_context():
            if self.path == "forest":
                return self._forest(forest, temperature, entropy_grad)
            return self._plain(forest, temperature, entropy_grad)

    # ------------------------------------------------------------------ each token once

    def _forest(self, forest: Forest, temperature: float, entropy_grad: bool) -> TokenScores:
        states, tokens = [], []
        for state, token in self._walk(forest):
            wanted = forest.token_sampled[token]
            states.append(state if bool(wanted.all()) else state[wanted.to(state.device)])
            tokens.append(token[wanted])
        order = torch.cat(tokens)
        targets = forest.token["token_ids"][order].to(self.device)
        head = self.model.get_output_embeddings()
        scores = score_states(
            torch.cat(states), targets, head, temperature, entropy_grad=entropy_grad, vocabulary=head.weight.shape[0]
        )
        return _scatter(scores, order.to(self.device), forest.num_tokens)

    def _walk(self, forest: Forest) -> Iterator[tuple[Tensor, Tensor]]:
        """The state that predicts each token, in batches: ([n, hidden], [n] rows of the token table)."""
        children: dict[int, list[int]] = defaultdict(list)  # of a segment row, or of a prompt as -1 - tree
        rows = zip(forest.segment["parent"].tolist(), forest.segment["tree"].tolist(), strict=True)
        for segment, (parent, tree) in enumerate(rows):
            children[parent if parent >= 0 else -1 - tree].append(segment)
        start, length = forest.segment["start"].tolist(), forest.segment["length"].tolist()
        token_ids = forest.token["token_ids"]
        prompts = forest.tree["prompt_length"].tolist()
        stack = [self._encode_prompts(forest, trees) for trees in length_buckets(prompts, MAX_POSITIONS)]
        while stack:
            rows_above = stack.pop()
            pairs = [(row, child) for row, key in enumerate(rows_above.ids) for child in children[key]]
            for bucket in length_buckets([length[child] for _, child in pairs], MAX_POSITIONS):
                above = [pairs[index][0] for index in bucket]
                segments = [pairs[index][1] for index in bucket]
                ids = [token_ids[start[s] : start[s] + length[s]] for s in segments]
                keep = any(children[segment] for segment in segments)
                rows_below, before = self._continue(rows_above, above, segments, ids)
                valid = rows_below.mask[:, -before.shape[1] :].bool()
                yield before[valid], torch.cat([torch.arange(start[s], start[s] + length[s]) for s in segments])
                if keep:
                    stack.append(rows_below)

    def _encode_prompts(self, forest: Forest, trees: list[int]) -> _Rows:
        lengths = forest.tree["prompt_length"][trees]
        prompts = forest.prompt_ids.split(forest.tree["prompt_length"].tolist())
        ids, mask = _pad([prompts[tree] for tree in trees], self.device)
        cache = DynamicCache()
        hidden = self._hidden(ids, mask, mask.cumsum(1) - 1, cache)
        last = lengths.to(self.device) - 1
        state = hidden[torch.arange(len(ids), device=self.device), last]
        return _Rows([-1 - tree for tree in trees], cache, mask, last + 1, state)

    def _continue(self, rows: _Rows, above: list[int], segments: list[int], ids: list[Tensor]) -> tuple[_Rows, Tensor]:
        """Encode one segment after each row `above`; also give the states before its tokens [rows, length, hidden]."""
        index = torch.tensor(above, device=self.device)
        slots = int(rows.mask[index].sum(0).nonzero().max()) + 1  # drop the padding that these rows do not need
        cache = _select(rows.cache, index, slots)
        own_ids, own_mask = _pad(ids, self.device)
        mask = torch.cat([rows.mask[index, :slots], own_mask], 1)
        position = rows.position[index]
        hidden = self._hidden(own_ids, mask, position[:, None] + own_mask.cumsum(1) - 1, cache)
        before = torch.cat([rows.state[index][:, None], hidden[:, :-1]], 1)
        length = own_mask.sum(1)
        state = hidden[torch.arange(len(ids), device=self.device), length - 1]
        return _Rows(segments, cache, mask, position + length, state), before

    def _hidden(self, ids: Tensor, mask: Tensor, position: Tensor, cache: DynamicCache) -> Tensor:
        out = self.model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state

    # ------------------------------------------------------------------ one row per completion

    def _plain(self, forest: Forest, temperature: float, entropy_grad: bool) -> TokenScores:
        owner = torch.full((forest.num_segments,), -1, dtype=torch.long)
        rows, columns, tokens, targets = [], [], [], []
        prompts = forest.prompt_ids.split(forest.tree["prompt_length"].tolist())
        pieces = forest.token["token_ids"].split(forest.segment["length"].tolist())
        full = []
        for row, leaf in enumerate(forest.ends.nonzero().squeeze(1).tolist()):
            path = forest.completion_segments(leaf)
            prompt = prompts[int(forest.segment["tree"][leaf])]
            full.append(torch.cat([prompt, *(pieces[segment] for segment in path)]))
            for segment in path:
                if owner[segment] < 0:  # a shared segment is read from the first row that has it
                    owner[segment] = row
                    begin = len(prompt) + int(forest.path_offset[segment]) - 1
                    size = len(pieces[segment])
                    rows.append(torch.full((size,), row))
                    columns.append(torch.arange(begin, begin + size))
                    start = int(forest.segment["start"][segment])
                    tokens.append(torch.arange(start, start + size))
                    targets.append(pieces[segment])
        ids, mask = _pad(full, self.device)
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
        ).logits
        row_index, column = torch.cat(rows).to(self.device), torch.cat(columns).to(self.device)
        order = torch.cat(tokens).to(self.device)
        scores = score_logits(logits[row_index, column], torch.cat(targets).to(self.device), temperature, entropy_grad)
        sampled = forest.token_sampled.to(self.device)[order]
        return _scatter(TokenScores(scores[0][sampled], scores[1][sampled]), order[sampled], forest.num_tokens)


@torch.no_grad()
def score(policy: Policy, forest: Forest, temperature: float, max_tokens: int) -> TokenScores:
    """Score a whole forest without gradients, part by part; results on the CPU."""
    pieces = cut(forest, max_tokens)
    scores = [policy(piece, temperature) for piece in pieces]
    return TokenScores(
        gather_owned(forest, pieces, [part.logprobs for part in scores]),
        gather_owned(forest, pieces, [part.entropy for part in scores]),
    )


@torch.no_grad()
def choose_path(policy: Policy, tolerance: float = 1e-3) -> float:
    """Compare the forest form with the model's own logits on a small random tree and keep the one that can be trusted.

    Sets `policy.path`. Some models scale or cap their logits outside the output layer, some see only a window of the
    last tokens, and some caches cannot be shared between rows: then the plain path is taken and the log says so.

    Returns:
        The largest difference of log-probabilities in fp32, infinite where the forest form cannot be used.
    """
    if _has_window(policy.model):
        policy.path = "plain"
        log.warning("scoring one row per completion: the forest form does not hold for sliding-window attention")
        return float("inf")
    forest = random_forest(policy.model.get_input_embeddings().weight.shape[0])
    autocast, policy.autocast = policy.autocast, None
    try:
        policy.path = "plain"
        plain = policy(forest).logprobs
        policy.path = "forest"
        try:
            difference = float((policy(forest).logprobs - plain).abs().max())
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            log.warning("the forest form does not run on this model (%s)", error)
            difference = float("inf")
    finally:
        policy.autocast = autocast
    if next(policy.model.parameters()).dtype != torch.float32:
        tolerance = max(tolerance, 0.1)
    if difference <= tolerance:
        log.info("scoring each token once (forest form; differs from the model's own logits by %.1e)", difference)
    else:
        policy.path = "plain"
        log.warning(
            "scoring one row per completion: the forest form differs from the model's own logits by %.2g", difference
        )
    return difference


def _has_window(model: PreTrainedModel) -> bool:
    """True when a layer sees only the last tokens: padding between a prompt and its children would shift its window."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    return any(kind != "full_attention" for kind in layers) if layers else bool(getattr(config, "sliding_window", None))


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


def _pad(rows: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids [rows, longest] and their 0/1 mask."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.cat(rows)
    return ids.to(device), mask.long().to(device)


def keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, [rows, heads, slots, head size]."""
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr, misc]


def _select(cache: DynamicCache, index: Tensor, slots: int) -> DynamicCache:
    """A new cache with the first `slots` entries of these rows; gradients flow through."""
    selected = DynamicCache()
    for number, (keys, values) in enumerate(keys_and_values(cache)):
        selected.update(keys[index, :, :slots], values[index, :, :slots], number)
    return selected


def _scatter(scores: TokenScores, order: Tensor, num_tokens: int) -> TokenScores:
    """Back to the order of the token table; rows without a score are 0."""
    if len(order) == num_tokens:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(num_tokens, device=order.device)
        return TokenScores(scores.logprobs[inverse], scores.entropy[inverse])
    return TokenScores(*(value.new_zeros(num_tokens).index_copy(0, order, value) for value in scores))

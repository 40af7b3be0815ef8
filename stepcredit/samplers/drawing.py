"""Drawing tokens by inverting the cumulative distribution: one uniform number for each token.

`draw` is the plain form. `draw_at_once` gives the same tokens with shapes that depend on nothing, in fewer passes over
the vocabulary: the cumulative sum is taken over sums of chunks and then inside one chunk, and top-k and top-p look at
the most likely tokens alone. Bytes at 256 rows and a vocabulary of 151,936, in units of the logits in fp32 (156 MB):
written by the model 1, largest 1, difference 2, exponential 2, entropy 2 to 4, sums of chunks 1, so about 10 where each
operation is a kernel; 4 where they are fused. `draw` moves about 16, and with top-p some 100 in its sort.
"""

import torch
from torch import Tensor
from torch.nn import functional

from stepcredit.policy.head import LEAST
from stepcredit.samplers.params import SamplingParams

CHUNK = 512  # tokens: about the root of a vocabulary, so that both sums are short
CANDIDATES = 1024  # most likely tokens that top-k and top-p look at


def draw(logits: Tensor, uniform: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `uniform`.

    Args:
        logits: [rows, vocabulary]; uniform: [rows] in [0, 1).

    Returns:
        token, its log-probability under the full distribution at the temperature, and that distribution's entropy.
    """
    greedy = params.temperature == 0
    scaled = logits.float() / (1.0 if greedy else params.temperature)
    logprobs = torch.log_softmax(scaled, -1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs.clamp(min=LEAST)).sum(-1)
    if greedy:
        token = logprobs.argmax(-1)
    elif params.truncates:
        kept, index = truncate(scaled, params)
        token = index.gather(-1, invert(kept, uniform)[:, None]).squeeze(-1)
    else:
        token = invert(probs, uniform)
    return token, logprobs.gather(-1, token[:, None]).squeeze(-1), entropy


def truncate(scaled: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """What top-k and then top-p leave: the sets of TopKLogitsWarper and TopPLogitsWarper of transformers, and of vLLM.

    Tokens that tie with the last of the top k stay. Top-p acts on what top-k left, scaled to sum to 1; of tokens that
    tie where it cuts, those with higher ids stay.

    Args:
        scaled: [rows, vocabulary] logits over the temperature.

    Returns:
        Weights of the tokens from the most likely on, 0 where left out, and their ids; both [rows, vocabulary].
    """
    ordered, index = scaled.sort(dim=-1, stable=True)
    if 0 < params.top_k < ordered.shape[-1]:
        ordered = ordered.masked_fill(ordered < ordered[:, -params.top_k, None], -torch.inf)
    weights = ordered.softmax(-1)
    if params.top_p < 1.0:
        left_out = weights.cumsum(-1) <= 1 - params.top_p
        left_out[:, -1] = False
        weights = weights.masked_fill(left_out, 0.0)
    return weights.flip(-1), index.flip(-1)


def invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """The index where the cumulative sum of `probs` first exceeds uniform * total: never one of probability 0."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:]
    point = _below(uniform[:, None] * total, total)
    return torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp(max=probs.shape[-1] - 1)


def _below(point: Tensor, total: Tensor) -> Tensor:
    """The point, or the largest number below the total where it is not below it."""
    return torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))


# ------------------------------------------------------------------ with static shapes


def draw_at_once(
    logits: Tensor, uniform: Tensor, params: SamplingParams, candidates: int = CANDIDATES
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `draw` gives, up to rounding, without a sort or a cumulative sum of the whole vocabulary.

    Args:
        logits: [rows, vocabulary] in fp32; uniform: [rows] in [0, 1).
        candidates: most likely tokens that top-k and top-p look at.

    Returns:
        The three of `draw`, and [rows] whether the token is valid: False where top-k and top-p keep more tokens than
        they have looked at, or may tie with others. Such rows are to be drawn by `draw`.
    """
    greedy = params.temperature == 0
    scaled = logits if params.temperature in (0, 1) else logits / params.temperature
    top = scaled.amax(-1, keepdim=True)
    below = scaled - top
    weights = below.exp()
    sums = chunk_sums(weights)
    total = sums.sum(-1)
    log_total = total.log()
    entropy = log_total - (weights * below.clamp(min=LEAST)).sum(-1) / total
    valid = torch.ones_like(uniform, dtype=torch.bool)
    if greedy:
        token = scaled.argmax(-1)
    elif params.truncates:
        token, valid = draw_from_candidates(scaled, top, total, uniform, params, candidates)
    else:
        token = invert_by_chunks(weights, sums, uniform)
    return token, below.gather(-1, token[:, None]).squeeze(-1) - log_total, entropy, valid


def chunk_sums(weights: Tensor, chunk: int = CHUNK) -> Tensor:
    """Sums of [rows, vocabulary] over chunks of neighbours; the last chunk may be shorter."""
    whole = weights.shape[-1] // chunk * chunk
    sums = weights[:, :whole].unflatten(-1, (-1, chunk)).sum(-1)
    if whole == weights.shape[-1]:
        return sums
    return torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1)


def invert_by_chunks(weights: Tensor, sums: Tensor, uniform: Tensor, chunk: int = CHUNK) -> Tensor:
    """`invert`, first among the chunks and then inside of one; `sums` are those of `chunk_sums`."""
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    point = _below(uniform[:, None] * total, total)
    number = _first(cumulative > point, sums > 0)
    index = number * chunk + torch.arange(chunk, device=weights.device)
    last = weights.shape[-1] - 1
    inside = weights.gather(-1, index.clamp(max=last)) * (index <= last)
    before = functional.pad(cumulative, (1, 0)).gather(-1, number)
    within = inside.cumsum(-1)
    place = _first(within > _below(point - before, within[:, -1:]), inside > 0)
    return index.gather(-1, place).squeeze(-1)


def _first(beyond: Tensor, possible: Tensor) -> Tensor:
    """[rows, 1] the first place with both. A parallel sum need not rise where it should, so it alone does not do."""
    return (beyond & possible).int().argmax(-1, keepdim=True)


def draw_from_candidates(
    scaled: Tensor, top: Tensor, total: Tensor, uniform: Tensor, params: SamplingParams, candidates: int
) -> tuple[Tensor, Tensor]:
    """Draw from what `truncate` leaves, looking at the most likely tokens alone.

    Args:
        scaled: [rows, vocabulary] logits over the temperature; top: [rows, 1] the largest.
        total: [rows] sum of exp(scaled - top).

    Returns:
        token, and whether it is valid: what is kept stands strictly above the least of the candidates, so that nothing
        outside of them could be kept or tie with it.
    """
    vocabulary = scaled.shape[-1]
    most = min(vocabulary, max(candidates, 2 * params.top_k))
    values, ids = scaled.topk(most, dim=-1)
    ids, order = ids.sort(-1, descending=True)  # of equal ones those with higher ids come first, as in `truncate`
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    weights = (values - top).exp()
    least = values[:, -1]
    valid = torch.ones_like(least, dtype=torch.bool)
    if 0 < params.top_k < vocabulary:
        last = values[:, params.top_k - 1]
        weights = weights * (values >= last[:, None])
        total, valid = weights.sum(-1), last > least
    if params.top_p < 1.0:
        shares = weights / total[:, None]
        outside = 1 - shares.sum(-1, keepdim=True)  # rounding where top-k has left nothing outside
        left_out = outside + shares.flip(-1).cumsum(-1).flip(-1) <= 1 - params.top_p
        left_out[:, 0] = False
        weights = weights.masked_fill(left_out, 0.0)
        if not 0 < params.top_k < vocabulary:
            valid = values.masked_fill(left_out, torch.inf).amin(-1) > least
    if most == vocabulary:
        valid = torch.ones_like(valid)
    return ids.gather(-1, invert(weights, uniform)[:, None]).squeeze(-1), valid

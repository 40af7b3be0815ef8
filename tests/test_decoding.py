"""Rows on forest attention: what is shared is encoded once and read once, whatever joins, ends or goes on."""

import pytest
import torch
from tiny_models import VOCABULARY, fresh, tiny

from stepcredit.forest.types import Segment
from stepcredit.policy import decoding
from stepcredit.policy.decoding import ForestRows
from stepcredit.policy.forward import Policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler

TOLERANCE = 1e-4
families = pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "mistral"])
PROMPTS = [[5, 6, 7], [8], list(range(20, 40)), [5, 6]]


def expected_logits(policy: Policy, ids: list[int]) -> torch.Tensor:
    """By the model itself, one row."""
    with torch.no_grad():
        return policy.model(torch.tensor([ids])).logits[0, -1].float()


@torch.no_grad()
@families
def test_rows_that_join_leave_and_outgrow_their_room(monkeypatch, family):
    """A random history of beginnings, steps and ends: at every step each row's logits are its own path's."""
    monkeypatch.setattr(decoding, "FIRST_ROOM", 2)
    policy, model = tiny(family), fresh(family)
    model.scoring_form = "plain"
    generator = torch.Generator().manual_seed(0)
    rows, prefixes = ForestRows(policy, 9, 16), []
    prefixes = rows.encode(PROMPTS)
    paths: list[list[int]] = []
    for step in range(14):
        if step in (0, 3, 4, 9):
            chosen = torch.randint(len(PROMPTS), (9 - len(paths),), generator=generator).tolist()[: 4 if step else 6]
            rows.begin([prefixes[number] for number in chosen])
            paths += [list(PROMPTS[number]) for number in chosen]
        tokens = torch.randint(VOCABULARY, (len(paths),), generator=generator)
        logits = rows.step(tokens)
        for path, token in zip(paths, tokens.tolist(), strict=True):
            path.append(token)
        expected = torch.stack([expected_logits(model, path) for path in paths])
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        if step in (1, 2, 5, 7, 11):
            keep = torch.rand(len(paths), generator=generator) < 0.6
            order = rows.drop(keep.numpy())
            paths = [paths[old] for old in order.tolist()]
    assert len(paths) > 1


@torch.no_grad()
def test_what_stays_is_not_copied():
    """The rows before the ended one, and the last one's place apart, keep their memory and their order."""
    policy = tiny("qwen2")
    rows = ForestRows(policy, 5, 8)
    rows.begin(rows.encode([[1, 2]]) * 5)
    rows.step(torch.tensor([3, 4, 5, 6, 7]))
    places = [tensor.data_ptr() for pair in rows.own for tensor in pair]
    order = rows.drop(torch.tensor([True, False, True, True, True]).numpy())
    assert order.tolist() == [0, 4, 2, 3]
    assert [tensor.data_ptr() for pair in rows.own for tensor in pair] == places


@torch.no_grad()
def test_a_prompt_is_held_once_for_its_group():
    """1024 tokens for 8 rows: what is held is a quarter, or less, of a copy for every row."""
    policy = fresh("qwen2", max_position_embeddings=2048)
    rows = ForestRows(policy, 8, 64)
    rows.begin(rows.encode([[index % VOCABULARY for index in range(1024)]]) * 8)
    rows.step(torch.arange(8))
    held = [
        *rows.own,
        *((shared.keys[i], shared.values[i]) for shared in rows.prefix_batches for i in range(len(rows.own))),
    ]
    numbers = sum(tensor.numel() for pair in held for tensor in pair)
    repeated = 8 * sum(2 * pair[0][0, :, 0].numel() * (1024 + 64) for pair in rows.own)
    assert numbers < repeated / 4


# ------------------------------------------------------------------ going on from what was sampled


def grow(policy: Policy, keep: bool, max_rows: int = 512, tokens: int = 4, branches: int = 3) -> list[Segment]:
    """Trees grown level by level; a segment that stopped is not continued."""
    sampler = TransformersSampler(policy, max_rows)
    params = SamplingParams(max_new_tokens=tokens, stop_token_ids=tuple(range(8)))
    prompts, found = [list(prompt) for prompt in PROMPTS], []
    for level in range(3):
        seeds = [1000 * level + number for number in range(len(prompts))]
        groups = sampler.sample(prompts, branches, params, seeds, num_reusable=len if keep else None)
        found += [segment for group in groups for segment in group]
        prompts = [
            [*prompt, *segment.token_ids]
            for prompt, group in zip(prompts, groups, strict=True)
            for segment in group
            if segment.finish == "length"
        ]
    return found


@families
@pytest.mark.parametrize("max_rows", [4, 512])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_tree_grown_from_kept_prefixes_is_the_tree_grown_anew(family, max_rows, tokens):
    """The same tokens, ends and log-probabilities, with keys and values kept and without."""
    kept, anew = (grow(tiny(family), keep, max_rows, tokens) for keep in (True, False))
    assert [list(segment.token_ids) for segment in kept] == [list(segment.token_ids) for segment in anew]
    assert len(kept) > 30
    for one, other in zip(kept, anew, strict=True):
        assert one.columns["rollout_logprobs"] == pytest.approx(other.columns["rollout_logprobs"], abs=TOLERANCE)


def test_prompts_that_are_parts_of_what_was_sampled():
    """A completion without its last token, a prompt twice in a call, a prompt that extends another by one token."""
    policy, params = tiny("qwen3"), SamplingParams(max_new_tokens=4, stop_token_ids=())
    sampler = TransformersSampler(policy, max_rows=3)
    first = list(sampler.sample([[5, 6, 7]], 2, params, [1], num_reusable=len)[0][0].token_ids)
    prompts = [[5, 6, 7, *first[:count]] for count in (3, 4, 3, 2, 1, 0)]
    for _ in range(2):
        found = sampler.sample(prompts, 2, params, [1, 2, 3, 4, 5, 6], num_reusable=len)
        expected = TransformersSampler(policy).sample(prompts, 2, params, [1, 2, 3, 4, 5, 6])
        for group, other in zip(found, expected, strict=True):
            assert [list(segment.token_ids) for segment in group] == [list(segment.token_ids) for segment in other]


def test_a_prompt_that_comes_twice_is_encoded_once(monkeypatch):
    policy, hidden = fresh("qwen2"), Policy.hidden
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(Policy, "hidden", lambda self, *given: seen.append(given[0].shape) or hidden(self, *given))
    TransformersSampler(policy).sample([[1, 2, 3, 4]] * 3, 2, SamplingParams(max_new_tokens=2), [1, 2, 3])
    assert [tuple(shape) for shape in seen if shape[1] > 1] == [(1, 4)]


def test_nothing_kept_is_encoded_again(monkeypatch):
    """After the first level every forward call is of one token a row."""
    policy, hidden = fresh("qwen2"), Policy.hidden
    seen: list[tuple[int, ...]] = []

    def spy(self, token_ids, position, plan):
        seen.append(tuple(token_ids.shape))
        return hidden(self, token_ids, position, plan)

    monkeypatch.setattr(Policy, "hidden", spy)
    grow(policy, keep=len)
    assert [shape for shape in seen if shape[1] > 1] == [(1, sum(map(len, PROMPTS)))]
    seen.clear()
    grow(policy, keep=False)
    assert len([shape for shape in seen if shape[1] > 1]) == 3


def test_sync_forgets_what_was_kept():
    """New weights make new keys: after `sync` the samples are those of a new sampler."""
    policy = fresh("qwen3")
    sampler, params = TransformersSampler(policy), SamplingParams(max_new_tokens=5, stop_token_ids=())
    first = sampler.sample(PROMPTS, 2, params, [1, 2, 3, 4], num_reusable=len)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    sampler.sync(policy)
    again = sampler.sample(PROMPTS, 2, params, [1, 2, 3, 4], num_reusable=len)
    expected = TransformersSampler(policy).sample(PROMPTS, 2, params, [1, 2, 3, 4])
    for found, other, old in zip(again, expected, first, strict=True):
        for one, two, three in zip(found, other, old, strict=True):
            assert one.columns == two.columns and one.columns != three.columns


def test_what_is_kept_does_not_hold_on_to_more():
    """Old batches go: the memory behind the kept tensors is about their own."""
    policy = tiny("qwen2")
    sampler, params = TransformersSampler(policy), SamplingParams(max_new_tokens=6, stop_token_ids=())
    prompts = [[index % VOCABULARY for index in range(start, start + 60)] for start in range(12)]
    for level in range(5):
        groups = sampler.sample(prompts, 1, params, [level] * len(prompts), num_reusable=len)
        prompts = [[*prompt, *group[0].token_ids] for prompt, group in zip(prompts, groups, strict=True)][1:]
    tensors = [tensor for prefix in sampler.prefix_cache for tensor in (*prefix.keys, *prefix.values)]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    tokens = 12 * 60 + 6 * sum(12 - level for level in range(5))
    needed = tokens * 2 * 2 * 2 * 8 * 4  # both, layers, kv heads, size, bytes
    assert sum(held.values()) < 2.1 * needed


def test_prompts_that_end_inside_of_what_was_kept(monkeypatch):
    """The middle of a completion, several of them, in any order: nothing is encoded again, the samples are the same."""
    policy, hidden = fresh("qwen3"), Policy.hidden
    params = SamplingParams(max_new_tokens=12, stop_token_ids=())
    sampler = TransformersSampler(policy)
    prompt = [5, 6, 7, 8]
    rows = sampler.sample([prompt], 3, params, [1], num_reusable=len)[0]
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(Policy, "hidden", lambda self, *given: seen.append(given[0].shape) or hidden(self, *given))
    for cuts in ((8, 3), (5, 8, 1), (3, 11, 12)):
        prompts = [[*prompt, *rows[number % 3].token_ids[:count]] for number, count in enumerate(cuts)]
        seeds = list(range(len(prompts)))
        found = sampler.sample(prompts, 2, params, seeds, num_reusable=len)
        assert all(shape[1] == 1 for shape in seen)
        expected = TransformersSampler(policy).sample(prompts, 2, params, seeds)
        seen.clear()
        for group, other in zip(found, expected, strict=True):
            for one, two in zip(group, other, strict=True):
                assert one.token_ids == two.token_ids
                assert one.columns["rollout_logprobs"] == pytest.approx(two.columns["rollout_logprobs"], abs=TOLERANCE)


def test_what_later_prompts_may_have_is_kept_and_no_more():
    """`keep` says how many tokens of each completion; a completion that nothing may follow is not held."""
    policy = fresh("qwen3")
    sampler, params = TransformersSampler(policy), SamplingParams(max_new_tokens=8, stop_token_ids=())
    rows = sampler.sample([[5, 6]], 4, params, [3], num_reusable=lambda ids: 3 if ids[0] % 2 else 0)[0]
    paths = {(5, 6), *((5, 6, *row.token_ids[:3]) for row in rows if row.token_ids[0] % 2)}
    assert 1 < len(paths) < 5
    assert all(path in sampler.prefix_cache for path in paths) and len(list(sampler.prefix_cache)) == len(paths)


def test_the_budget_of_what_is_kept():
    """Beyond it nothing is added, and the count is of the tokens held."""
    policy = fresh("qwen3")
    params = SamplingParams(max_new_tokens=8, stop_token_ids=())
    each = 3 * 2 * 2 * 8 * 4  # layers, both, kv heads, size, bytes of a token
    sampler = TransformersSampler(policy, keep_mb=(4 + 2 * 7) * each / 2**20)
    sampler.sample([[5, 6, 7, 8]], 5, params, [1], num_reusable=len)
    assert sampler.prefix_cache.bytes == (4 + 2 * 7) * each and len(list(sampler.prefix_cache)) == 3
    sampler.sync(policy)
    assert sampler.prefix_cache.bytes == 0 and len(list(sampler.prefix_cache)) == 0


def test_each_prompt_may_have_a_limit_of_its_own():
    """Completions of several lengths in one call, the tokens as without the limits."""
    policy = fresh("qwen3")
    sampler, params = TransformersSampler(policy, max_rows=3), SamplingParams(max_new_tokens=9, stop_token_ids=())
    whole = sampler.sample(PROMPTS, 2, params, [1, 2, 3, 4])
    limits = [1, 9, 4, 6]
    for policy.scoring_form in ("forest", "plain"):
        found = sampler.sample(PROMPTS, 2, params, [1, 2, 3, 4], limits)
        for group, other, limit in zip(found, whole, limits, strict=True):
            assert [row.token_ids for row in group] == [row.token_ids[:limit] for row in other]
            assert all(row.finish == "length" for row in group)

"""The transformers sampler: what it draws, what it reports, and what its draws may depend on."""

import shutil

import pytest
import torch
from tiny_models import FAMILIES, OTHERS, STOP, VOCABULARY, fresh, tiny
from transformers import TopKLogitsWarper, TopPLogitsWarper

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy.forward import Policy
from stepcredit.samplers import decoding
from stepcredit.samplers.drawing import chunk_sums, draw, draw_at_once, invert, invert_by_chunks, truncate
from stepcredit.samplers.machine import draw_for
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [3, 4], [20, 21, 22, 23]]
STOPS = tuple(range(12))  # many stop tokens: completions of many lengths
SEEDS = [12, 23, 34, 45, 56]
families = pytest.mark.parametrize("family", FAMILIES)
paths = pytest.mark.parametrize("path", ["forest", "cached", "plain"])


def sample(policy: Policy, prompts=PROMPTS, n=4, seeds=SEEDS, max_rows=512, on_progress=None, **params):
    sampler = TransformersSampler(policy, max_rows, on_progress)
    chosen = SamplingParams(**{"max_new_tokens": 16, "stop_token_ids": STOPS} | params)
    return sampler.sample(prompts, n, chosen, seeds[: len(prompts)])


def tokens(groups: list[list[Segment]]) -> list[list[list[int]]]:
    return [[list(segment.token_ids) for segment in group] for group in groups]


def on_path(family: str, path: str) -> Policy:
    policy = fresh(family)
    policy.scoring_form = path
    return policy


def next_logits(policy: Policy, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@pytest.mark.parametrize("temperature", [0.8, 1.0])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.7}, {"top_k": 3}], ids=["full", "top_p", "top_k"])
def test_reported_logprobs_and_entropy_equal_scored_ones(family, temperature, options):
    """Rollout log-probabilities are of the full distribution at the temperature, also with top-p and top-k."""
    policy = tiny(family)
    groups = sample(policy, temperature=temperature, max_rows=6, **options)
    trees = [Tree(Problem(), prompt, group) for prompt, group in zip(PROMPTS, groups, strict=True)]
    forest = Forest.from_trees(trees)
    with torch.no_grad():
        scored = policy(forest, temperature)
    torch.testing.assert_close(forest.token["rollout_logprobs"], scored.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(forest.token["entropy"], scored.entropy, atol=1e-4, rtol=0)


@families
@paths
@pytest.mark.parametrize("max_rows", [1, 3, 18])
def test_completions_do_not_depend_on_max_rows(family, path, max_rows):
    """Few rows at once, groups cut apart and prompts admitted late: the same tokens and ends as all at once."""
    few = sample(on_path(family, path), n=8, max_rows=max_rows, max_new_tokens=12)
    all_at_once = sample(tiny(family), n=8, max_new_tokens=12)
    assert tokens(few) == tokens(all_at_once)
    finishes = [[segment.finish for segment in group] for group in all_at_once]
    assert [[segment.finish for segment in group] for group in few] == finishes
    assert len({len(ids) for group in tokens(few) for ids in group}) > 3  # rows did finish at different times


@paths
def test_tokens_do_not_depend_on_the_other_prompts(path):
    """A problem gets the same completions alone, in company and in another order."""
    policy = on_path("qwen3", path)
    together = tokens(sample(policy))
    for index, prompt in enumerate(PROMPTS):
        assert tokens(sample(policy, [prompt], seeds=[SEEDS[index]])) == [together[index]]
    assert tokens(sample(policy, PROMPTS[::-1], seeds=SEEDS[::-1])) == together[::-1]


def test_seeds_decide():
    """The same seed repeats itself, another one does not, and the samples of a prompt differ."""
    policy = tiny("qwen2")
    first, again = tokens(sample(policy)), tokens(sample(policy))
    other = tokens(sample(policy, seeds=[seed + 1 for seed in SEEDS]))
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert all(len({tuple(ids) for ids in group}) == len(group) for group in first)


def test_prompts_of_very_different_lengths():
    """A prompt of 200 tokens beside one of a single token changes neither."""
    policy = tiny("llama")
    prompts = [[7], [(3 * index) % VOCABULARY for index in range(200)], [8, 9]]
    together = tokens(sample(policy, prompts, max_rows=5))
    for index, prompt in enumerate(prompts):
        assert tokens(sample(policy, [prompt], seeds=[SEEDS[index]])) == [together[index]]


@paths
def test_stop_token_ends_a_completion(path):
    """A completion ends with its first stop token, which is included, or is truncated at max_new_tokens."""
    segments = [segment for group in sample(on_path("llama", path), n=8, max_new_tokens=9) for segment in group]
    for segment in segments:
        ids = list(segment.token_ids)
        assert not set(ids[:-1]) & set(STOPS)
        if segment.finish == "stop":
            assert ids[-1] in STOPS and len(ids) <= 9
        else:
            assert segment.finish == "length" and ids[-1] not in STOPS and len(ids) == 9
        assert {len(values) for values in segment.columns.values()} == {len(ids)}
    assert {segment.finish for segment in segments} == {"stop", "length"}


@pytest.mark.parametrize("max_rows", [5, 13])
def test_rows_that_wait_to_be_dropped_change_nothing(monkeypatch, max_rows):
    """Completions admitted at different times, up to half of them finished but not yet dropped: the same ends."""
    prompts, seeds = [[(7 * index) % VOCABULARY, index] for index in range(90)], list(range(90))
    expected = sample(tiny("qwen2"), prompts, n=1, seeds=seeds, max_new_tokens=14)
    monkeypatch.setattr(decoding, "DROP_SHARE", 2)
    found = sample(tiny("qwen2"), prompts, n=1, seeds=seeds, max_rows=max_rows, max_new_tokens=14)
    assert tokens(found) == tokens(expected)
    ends = {(segment.finish, segment.token_ids[-1] in STOPS) for group in found for segment in group}
    assert ends == {("stop", True), ("length", False)}


def test_a_stop_token_in_the_last_place_is_a_stop():
    """With every token a stop token, one token is drawn and the finish is "stop", also when there is room for one."""
    for room in (1, 5):
        groups = sample(tiny("qwen2"), stop_token_ids=tuple(range(VOCABULARY)), max_new_tokens=room)
        assert all(len(segment.token_ids) == 1 and segment.finish == "stop" for group in groups for segment in group)


@pytest.mark.parametrize("max_new_tokens", [1, 5])
def test_without_stop_tokens_all_are_truncated(max_new_tokens):
    groups = sample(tiny("qwen2"), stop_token_ids=(), max_new_tokens=max_new_tokens)
    assert all(len(s.token_ids) == max_new_tokens and s.finish == "length" for group in groups for s in group)


def test_stop_tokens_are_the_models_own_by_default():
    """None takes the generation config's stop tokens, one or many; given ids replace them."""
    policy = fresh("qwen2")
    full = [ids for group in tokens(sample(policy, stop_token_ids=(), max_new_tokens=8)) for ids in group]
    seen = full[0][2], full[1][4]
    for stops in ((STOP,), seen):
        policy.model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else list(stops)
        found = [ids for group in tokens(sample(policy, stop_token_ids=None, max_new_tokens=8)) for ids in group]
        assert found == [cut_at(ids, stops) for ids in full]
    assert found != full
    given = [ids for group in tokens(sample(policy, stop_token_ids=(full[2][0],), max_new_tokens=8)) for ids in group]
    assert given == [cut_at(ids, (full[2][0],)) for ids in full]


def cut_at(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    ends = [index for index, token in enumerate(ids) if token in stops]
    return ids[: ends[0] + 1] if ends else ids


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@pytest.mark.parametrize("max_rows", [2, 512])
def test_temperature_zero_equals_generate(family, max_rows):
    """Greedy tokens are those of `model.generate(do_sample=False)`, and log-probabilities those of temperature 1."""
    policy = tiny(family)
    groups = sample(policy, n=2, temperature=0.0, max_new_tokens=20, max_rows=max_rows)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt])
        expected = policy.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert [list(segment.token_ids) for segment in group] == [expected, expected]
        logprob = torch.log_softmax(next_logits(policy, prompt), -1).max()
        assert group[0].columns["rollout_logprobs"][0] == pytest.approx(float(logprob), abs=1e-4)


def test_sliding_windows_see_the_same_tokens_in_any_batch():
    """A window counts cache slots: rows that join late, beside longer ones, must have no gap inside it."""
    policy = fresh("Mistral", sliding_window=6)
    prompts = [list(range(40, 70)), [5, 6, 7], [8], list(range(30, 45)), [9, 10]]
    for max_rows in (1, 3, 4):
        for prompt, group in zip(prompts, sample(policy, prompts, n=2, max_rows=max_rows), strict=True):
            for segment in group:
                ids = [*prompt, *segment.token_ids]
                with torch.no_grad():
                    full = torch.log_softmax(policy.model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1], -1)
                expected = full.gather(1, torch.tensor(segment.token_ids)[:, None]).squeeze(1)
                found = torch.tensor(segment.columns["rollout_logprobs"])
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@families
def test_top_k_of_one_is_greedy(family):
    assert tokens(sample(tiny(family), top_k=1)) == tokens(sample(tiny(family), temperature=0.0))


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.5, 0), (0.9, 0), (1.0, 4), (0.6, 3), (1e-6, 0)])
def test_truncation_keeps_to_its_set(temperature, top_p, top_k):
    """First tokens are in the smallest set with the share top_p of the top_k's probability; all of that set come up."""
    policy, prompt = tiny("qwen3"), PROMPTS[0]
    groups = sample(policy, [prompt], n=4000, temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=1)
    probs = torch.softmax(next_logits(policy, prompt) / temperature, -1)
    order = probs.argsort(descending=True).tolist()
    size, mass = 0, 0.0
    whole = float(probs[order[: top_k or VOCABULARY]].sum())
    while mass < top_p * whole and size < (top_k or VOCABULARY):
        mass += float(probs[order[size]])
        size += 1
    kept = order[:size]
    found = [group.token_ids[0] for group in groups[0]]
    assert set(found) <= set(kept)
    likely = [token for token in kept if probs[token] / mass > 0.01]  # missing one has probability below 1e-17
    assert set(likely) <= set(found)
    share = torch.tensor([found.count(token) / 4000 for token in kept])
    assert (share - probs[kept] / mass).abs().max() < 0.04
    for segment in groups[0][:20]:
        expected = float(probs[segment.token_ids[0]].log())
        assert segment.columns["rollout_logprobs"][0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 3, 10, 40, VOCABULARY, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.6, 0.3, 1e-3])
def test_truncation_is_that_of_transformers(temperature, top_k, top_p):
    """The same tokens with the same probabilities as its warpers leave, top-k first, on logits with many ties.

    Which of several equally likely tokens top-p cuts off depends on their sort, which is not stable, so where there are
    ties the probabilities are compared.
    """
    generator = torch.Generator().manual_seed(top_k)
    logits = torch.randn(300, VOCABULARY, generator=generator)
    logits[100:200] = (logits[100:200] * 2).round() / 2  # ties
    logits[200:] = logits[200:].bfloat16().float()
    scaled = logits / temperature
    expected = TopKLogitsWarper(top_k)(None, scaled) if top_k else scaled
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    weights, index = truncate(scaled, SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k))
    found = torch.zeros_like(weights).scatter(1, index, weights)
    untied = slice(None) if top_p == 1 else slice(100)
    assert torch.equal(found[untied] > 0, expected[untied].isfinite())
    assert torch.equal(scaled.masked_fill(found == 0, -torch.inf).sort().values, expected.sort().values)
    found = found / found.sum(-1, keepdim=True)
    torch.testing.assert_close(found.sort().values, expected.softmax(-1).sort().values)
    torch.testing.assert_close(found[untied], expected[untied].softmax(-1))
    uniform = torch.linspace(0, 1, 300)
    token, _, _ = draw(logits, uniform, SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k))
    assert found.gather(1, token[:, None]).min() > 0


def test_top_p_acts_on_what_top_k_left():
    """Example: 0.4, 0.3, 0.2, 0.1 with top_k 2 leave 4/7 and 3/7; of these top_p 0.5 keeps the first alone."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    weights, index = truncate(logits, SamplingParams(top_p=0.5, top_k=2))
    assert index[weights > 0].tolist() == [0]
    assert truncate(logits, SamplingParams(top_p=0.5))[0].count_nonzero() == 2


def test_ties_with_the_last_of_the_top_k_stay():
    logits = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]]).log()
    weights, index = truncate(logits, SamplingParams(top_k=2))
    assert sorted(index[weights > 0].tolist()) == [0, 1, 2]


@paths
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_frequencies_are_the_softmax(path, temperature):
    """Chi-square of 20000 first tokens against softmax(logits / temperature) is below its 1e-4 quantile."""
    policy, prompt, total = on_path("llama", path), PROMPTS[2], 20000
    groups = sample(policy, [prompt], n=total, max_rows=total, temperature=temperature, max_new_tokens=1)
    probs = torch.softmax(next_logits(policy, prompt).double() / temperature, -1)
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in groups[0]]), minlength=VOCABULARY).double()
    common = probs * total >= 5
    expected = torch.cat([probs[common], probs[~common].sum()[None]]) * total
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    degrees = len(expected) - 1
    chi_square = float(((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    assert degrees >= 5
    # Wilson-Hilferty: the quantile of chi-square from that of the normal distribution, 3.72
    assert chi_square < degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-24, 1.0])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.999}, {"top_k": 90}], ids=["full", "top_p", "top_k"])
def test_draw_never_returns_what_has_probability_zero(uniform, options):
    """Also at the ends of the unit interval and between tokens that underflow or are excluded by -inf."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, VOCABULARY, generator=generator)
    logits[:, :3] = -1000.0
    logits[:, -3:] = -torch.inf
    logits[:, 40] = -torch.inf
    token, logprob, entropy = draw(logits, torch.full((200,), uniform), SamplingParams(**options))
    assert logits.softmax(-1).gather(1, token[:, None]).min() > 0
    assert logprob.isfinite().all() and entropy.isfinite().all()


def test_draw_inverts_the_cumulative_distribution():
    """Example: probabilities 0.5, 0.3, 0.2; top_p 0.7 keeps two of them and scales them."""
    logits = torch.tensor([0.3, 0.5, 0.2]).log().expand(5, 3)
    uniform = torch.tensor([0.0, 0.29, 0.31, 0.79, 0.81])
    token, logprob, entropy = draw(logits, uniform, SamplingParams())
    assert token.tolist() == [0, 0, 1, 1, 2]
    torch.testing.assert_close(logprob, logits[0][token])
    torch.testing.assert_close(entropy, torch.full((5,), 1.0296530))
    kept, logprob, _ = draw(logits, uniform, SamplingParams(top_p=0.7))
    assert kept.tolist() == [1, 1, 1, 0, 0]  # the likely token comes first: 0.625 and 0.375
    torch.testing.assert_close(logprob, logits[0][kept])


@paths
@pytest.mark.parametrize("max_rows", [1, 3, 512])
def test_progress_adds_up(path, max_rows):
    """`on_progress` counts every completion once."""
    calls: list[int] = []
    sample(on_path("qwen2", path), max_rows=max_rows, on_progress=calls.append)
    assert sum(calls) == len(PROMPTS) * 4 and min(calls) > 0
    assert len(calls) > 1


def calls(monkeypatch, policy: Policy, **options) -> list[tuple[int, int]]:
    """The shapes of the forward calls of one `sample`."""
    seen, hidden = [], policy.hidden

    def spy(token_ids, position, plan):
        seen.append(tuple(token_ids.shape))
        return hidden(token_ids, position, plan)

    monkeypatch.setattr(policy, "hidden", spy)
    sample(policy, **options)
    return seen


def test_no_more_rows_than_max_rows(monkeypatch):
    """The model is never called with more rows than allowed."""
    shapes = calls(monkeypatch, on_path("qwen2", "forest"), max_rows=3)
    assert max(rows for rows, length in shapes if length == 1) == 3


def test_a_prompt_is_encoded_once_for_its_group(monkeypatch):
    """A group that fits costs one pass over its prompt: all prompts in one call, one row, nothing padded."""
    shapes = calls(monkeypatch, on_path("qwen2", "forest"))
    assert [shape for shape in shapes if shape[1] > 1] == [(1, sum(map(len, PROMPTS)))]


def test_a_group_cut_apart_encodes_its_prompt_once(monkeypatch):
    """Eight completions through three rows: the rest of the group goes on from what was encoded."""
    shapes = calls(monkeypatch, on_path("qwen2", "forest"), prompts=[PROMPTS[2]], n=8, max_rows=3)
    assert [shape for shape in shapes if shape[1] > 1] == [(1, len(PROMPTS[2]))]


@paths
@pytest.mark.parametrize("max_rows", [3, 512])
def test_looking_rarely_for_ended_rows_changes_nothing(monkeypatch, path, max_rows):
    """Rows that ended some steps ago, and steps after the last row's end, leave no trace."""
    expected = sample(on_path("qwen2", path), max_rows=max_rows)
    monkeypatch.setattr(decoding, "CHECK_EVERY", {"cpu": 7})
    found = sample(on_path("qwen2", path), max_rows=max_rows)
    assert tokens(found) == tokens(expected)
    assert [s.finish for group in found for s in group] == [s.finish for group in expected for s in group]


def test_the_plain_path_never_pads():
    """Models whose caches do not take padding decode prompts of one length at a time."""
    policy, masks = on_path("qwen2", "plain"), []
    hook = policy.model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    try:
        sample(policy, [*PROMPTS, [30, 31]], seeds=[*SEEDS, 66])
    finally:
        hook.remove()
    assert all(bool(mask.all()) for mask in masks)


def test_no_prompts_give_no_groups():
    assert sample(tiny("qwen2"), [], seeds=[]) == []


# ------------------------------------------------------------------ drawing with static shapes


@pytest.mark.parametrize("vocabulary", [1, 7, 64, 97, 1000, 5120])
@pytest.mark.parametrize("chunk", [1, 8, 64, 512])
def test_inverting_by_chunks_is_inverting(vocabulary, chunk):
    """In fp64 the token is that of the whole cumulative sum for every number, probabilities of 0 among them."""
    generator = torch.Generator().manual_seed(vocabulary)
    probs = torch.rand(400, vocabulary, generator=generator, dtype=torch.float64) ** 8
    probs[:200] *= torch.rand(200, vocabulary, generator=generator) < 0.1
    probs[:200, vocabulary // 2] += 1e-3
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    uniform[:3] = torch.tensor([0.0, 1 - 2**-53, 1.0])
    found = invert_by_chunks(probs, chunk_sums(probs, chunk), uniform, chunk)
    assert torch.equal(found, invert(probs, uniform))
    assert probs.gather(1, found[:, None]).min() > 0


def test_drawing_at_once_is_drawing():
    """A vocabulary of 30,000: the tokens of the plain form but for rounding at boundaries; never one of weight 0."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2000, 30_000, generator=generator)
    logits[:, ::3] = -torch.inf
    logits[:1000] = logits[:1000].bfloat16().float()  # ties
    uniform = torch.rand(2000, generator=generator)
    for options in ({}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 40}):
        params = SamplingParams(**options)
        token, logprobs, entropy, valid = draw_at_once(logits, uniform, params)
        expected, expected_logprobs, expected_entropy = draw(logits, uniform, params)
        same = token == expected
        assert valid.float().mean() > 0.9 and (same | ~valid).float().mean() > 0.995
        if not params.truncates and params.temperature:  # no further from the sum in fp64 than the plain form is
            exact = invert((logits.double() / params.temperature).softmax(-1), uniform.double())
            assert (token != exact).sum() <= (expected != exact).sum() + 1
        assert logits.gather(1, token[:, None]).isfinite().all()
        torch.testing.assert_close(logprobs[same], expected_logprobs[same], atol=1e-4, rtol=0)
        torch.testing.assert_close(entropy, expected_entropy, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0])
@pytest.mark.parametrize(
    "options", [{"top_p": 0.9}, {"top_p": 0.3}, {"top_k": 3}, {"top_k": 20, "top_p": 0.8}, {"top_k": 500}]
)
def test_what_candidates_settle_is_what_is_kept(temperature, options):
    """Logits full of ties, 60 candidates of 97: tokens that count are those of `truncate`, over all of [0, 1)."""
    params = SamplingParams(temperature=temperature, **options)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(60, VOCABULARY, generator=generator)
    logits[20:40] = (logits[20:40] * 2).round() / 2
    logits[40:] = logits[40:].bfloat16().float()
    settled = same = 0
    for uniform in torch.linspace(0, 1 - 1e-6, 40):
        everywhere = uniform.expand(60)
        token, _, _, valid = draw_at_once(logits, everywhere, params, candidates=60)
        expected = draw(logits, everywhere, params)[0]
        same += int((token == expected)[valid].sum())
        kept, index = truncate(logits / temperature, params)
        weight = torch.zeros_like(kept).scatter(1, index, kept).gather(1, token[:, None])[:, 0]
        assert weight[valid].min() > 0
        settled += int(valid.sum())
    assert settled > 800 and same >= 0.995 * settled  # the rest is rounding at a boundary


def test_frequencies_of_drawing_at_once_are_the_softmax():
    """Chi-square over 50 tokens of 200,000 draws, below its 1e-4 quantile."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(4)).expand(200_000, 50)
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(5))
    probs = logits[0].double().softmax(-1)
    weights = logits.exp()
    for token in (
        draw_at_once(logits, uniform, SamplingParams())[0],
        invert_by_chunks(weights, chunk_sums(weights, 7), uniform, 7),
    ):
        counts = torch.bincount(token, minlength=50).double()
        chi_square = float(((counts - 200_000 * probs) ** 2 / (200_000 * probs)).sum())
        assert chi_square < 49 * (1 - 2 / (9 * 49) + 3.72 * (2 / (9 * 49)) ** 0.5) ** 3


@pytest.mark.slow
def test_drawing_can_be_compiled():
    """By torch's compiler, as on a GPU; the same tokens."""
    if shutil.which("g++") is None:
        pytest.skip("torch compiles for a CPU with g++")
    generator = torch.Generator().manual_seed(0)
    logits, uniform = 3 * torch.randn(64, 1500, generator=generator), torch.rand(64, generator=generator)
    for options in ({}, {"top_p": 0.5}):
        params = SamplingParams(**options)
        compiled, plain = (draw_for(params, 1500, torch.device("cpu"), compiles) for compiles in (True, False))
        assert compiled is not plain and hasattr(compiled, "_torchdynamo_orig_callable")
        for found, expected in zip(compiled(logits, uniform), plain(logits, uniform), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

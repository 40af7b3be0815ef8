"""Rows in pages with a static step: the samples of rows that grow, token by token, and pages that all come back."""

import functools
import shutil

import pytest
import torch
from tiny_models import fresh, tiny
from torch import _dynamo as dynamo
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask

from stepcredit.errors import UserError
from stepcredit.forest.types import Problem, Segment
from stepcredit.growth.options import StepOptions, TreeOptions
from stepcredit.growth.steps import StepRule
from stepcredit.growth.tree import tree
from stepcredit.policy import paged
from stepcredit.policy.attention import AttentionRule
from stepcredit.policy.forward import Policy
from stepcredit.policy.paged import CacheShape, PagePool
from stepcredit.policy.paged_attention import FlexPages, PagedStep, reference
from stepcredit.samplers import machine
from stepcredit.samplers import paged as paged_loop
from stepcredit.samplers.base import rest
from stepcredit.samplers.paged import PagedDecoding
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler, decodes_in_pages

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [3, 4], [20, 21, 22, 23]]
SEEDS = [12, 23, 34, 45, 56]
STOPS = tuple(range(12))
FAMILIES = ["qwen2", "qwen3", "gemma2", "gemma3", "mistral", "granite"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pages of 4 tokens, steps for 2, 4, 8 and 16 rows."""
    monkeypatch.setattr(paged, "PAGE", 4)
    monkeypatch.setattr(machine, "BUCKETS", (2, 4, 8, 16))


def both(policy: Policy, max_rows: int = 64, **given) -> tuple[TransformersSampler, TransformersSampler]:
    return tuple(TransformersSampler(policy, max_rows, paged=form, **given) for form in (True, False))  # type: ignore


def assert_same(found: list[list[Segment]], expected: list[list[Segment]]) -> None:
    assert len(found) == len(expected)
    for group, other in zip(found, expected, strict=True):
        for one, two in zip(group, other, strict=True):
            assert (list(one.token_ids), one.finish) == (list(two.token_ids), two.finish)
            for name, values in two.columns.items():
                assert one.columns[name] == pytest.approx(values, abs=1e-4)


def assert_all_pages_are_back(sampler: TransformersSampler) -> None:
    sampler.prefix_cache.clear()
    pool = sampler.machine.rows.pool
    assert sorted(pool.free) == list(range(1, pool.pages))
    assert not pool.holders.any()


def compare(family: str, max_rows: int, **options) -> list[list[Segment]]:
    params = SamplingParams(**{"max_new_tokens": 21, "stop_token_ids": STOPS} | options)
    ours, other = both(tiny(family), max_rows)
    found = ours.sample(PROMPTS, 4, params, SEEDS)
    assert_same(found, other.sample(PROMPTS, 4, params, SEEDS))
    assert_all_pages_are_back(ours)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_rows", [1, 5, 64])
def test_the_samples_are_those_of_rows_that_grow(family, max_rows):
    """Groups, rows that wait and join, stop tokens, rows that end one after the other, windows and caps."""
    found = compare(family, max_rows)
    assert len({len(row.token_ids) for group in found for row in group}) > 4


@pytest.mark.parametrize("max_rows", [3, 64])
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.8}, {"top_k": 5}, {"top_p": 0.6, "top_k": 9}],
    ids=["cooler", "greedy", "top_p", "top_k", "both"],
)
def test_however_they_are_drawn(max_rows, options):
    compare("qwen3", max_rows, **options)


@pytest.mark.parametrize("max_rows", [2, 64])
@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 3}, {"top_p": 0.9, "top_k": 4}])
def test_rows_that_the_candidates_do_not_settle_go_on(monkeypatch, max_rows, options):
    """Six candidates, of which top-p often keeps more: these rows are drawn with a whole sort and go on."""
    settled: list[int] = []
    given = functools.partial(machine.draw_at_once, candidates=6)
    monkeypatch.setattr(machine, "draw_at_once", lambda *args: settled.append(0) or given(*args))
    monkeypatch.setattr(paged_loop, "MAX_UNSETTLED", 2)
    waits = []
    settle = PagedDecoding._settle
    monkeypatch.setattr(PagedDecoding, "_settle", lambda self: waits.append(len(self.unsettled)) or settle(self))
    compare("qwen2", max_rows, **options)
    assert settled and (sum(waits) > 10) == ("top_k" not in options)


def test_flat_distributions_are_sorted_whole(monkeypatch, caplog):
    """Where most rows are not settled, the steps that follow settle all."""
    monkeypatch.setattr(machine, "draw_at_once", functools.partial(machine.draw_at_once, candidates=3))
    waits = []
    settle = PagedDecoding._settle
    monkeypatch.setattr(PagedDecoding, "_settle", lambda self: waits.append(len(self.unsettled)) or settle(self))
    with caplog.at_level("INFO", logger="stepcredit"):
        compare("qwen2", 64, top_p=0.9)
    assert "the vocabulary is sorted" in caplog.text
    assert any(waits[:3]) and not any(waits[3:])


def test_each_prompt_may_have_a_limit_of_its_own():
    params = SamplingParams(max_new_tokens=30, stop_token_ids=())
    limits = [1, 30, 2, 9, 17]
    for max_rows in (3, 64):
        ours, other = both(tiny("qwen3"), max_rows)
        found = ours.sample(PROMPTS, 3, params, SEEDS, limits)
        assert [{len(row.token_ids) for row in group} for group in found] == [{limit} for limit in limits]
        assert_same(found, other.sample(PROMPTS, 3, params, SEEDS, limits))


def test_calls_follow_each_other_on_the_same_pages():
    """Other prompts, stop tokens and ways to draw: the memory of the first call serves them all."""
    ours, other = both(tiny("qwen3"), 6)
    places = set()
    for number, options in enumerate([{}, {"top_k": 4}, {"stop_token_ids": (40, 41)}, {"temperature": 0.0}]):
        params = SamplingParams(**{"max_new_tokens": 15, "stop_token_ids": STOPS} | options)
        prompts = [prompt[::-1] for prompt in PROMPTS] if number % 2 else PROMPTS
        assert_same(ours.sample(prompts, 2, params, SEEDS), other.sample(prompts, 2, params, SEEDS))
        places.add((ours.machine.rows.pool.data.data_ptr(), ours.machine.steps.inbox.data_ptr()))
    assert len(places) == 1
    longer = [list(range(50))] * 3
    params = SamplingParams(max_new_tokens=80, stop_token_ids=())
    assert_same(ours.sample(longer, 4, params, SEEDS[:3]), other.sample(longer, 4, params, SEEDS[:3]))
    assert ours.machine.rows.width > 16
    assert_all_pages_are_back(ours)


def test_stop_tokens_and_reported_order_of_progress():
    """Every completion is reported once, and none before its window is read."""
    ended: list[int] = []
    sampler = TransformersSampler(tiny("qwen2"), 3, ended.append, paged=True)
    sampler.sample(PROMPTS, 4, SamplingParams(max_new_tokens=9, stop_token_ids=STOPS), SEEDS)
    assert sum(ended) == 20 and min(ended) > 0 and len(ended) > 3


# ------------------------------------------------------------------ trees


def grown(sampler: TransformersSampler, shape: TreeOptions, rule: StepRule, max_new_tokens: int) -> list[Segment]:
    problems = [Problem(id=str(number)) for number in range(3)]
    params = SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=STOPS[:4])
    forest = tree(sampler, problems, lambda problem: PROMPTS[int(problem.id)], params, SEEDS[:3], shape, rule)
    return [segment for grown in forest.to_trees() for segment in grown.segments]


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("mode", ["complete", "stepwise"])
@pytest.mark.parametrize(("step", "max_rows"), [(3, 64), (4, 5), (1, 64)])
def test_trees_grow_from_pages(family, mode, step, max_rows):
    """Cut in the middle of a page and at its end; the pages of what was sampled are those of what follows."""
    shape = TreeOptions(num_branches=2, depth=4, step=StepOptions(tokens=step), mode=mode)
    ours, other = both(tiny(family), max_rows)
    found, expected = (grown(sampler, shape, StepRule(tokens=step), 20) for sampler in (ours, other))
    assert_same([found], [expected])
    assert len(ours.prefix_cache) > 8
    assert_all_pages_are_back(ours)


def test_nothing_is_encoded_twice(monkeypatch):
    """After the first level every forward call is of one token a row."""
    policy, hidden = fresh("qwen3"), Policy.hidden
    sampler = TransformersSampler(policy, paged=True)
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(Policy, "hidden", lambda self, *given: seen.append(given[0].shape) or hidden(self, *given))
    shape = TreeOptions(num_branches=3, depth=3, step=StepOptions(tokens=3))
    grown(sampler, shape, StepRule(tokens=3), 12)
    several = [tuple(shape) for shape in seen if shape[1] > 1]
    assert several == [(1, sum(map(len, PROMPTS[:3])))]


def test_segments_share_the_pages_above_them():
    """16 rows that go on from one segment hold its pages once, and their own."""
    policy, params = fresh("qwen3"), SamplingParams(max_new_tokens=12, stop_token_ids=())
    sampler = TransformersSampler(policy, paged=True)
    prompt = list(range(20, 61))
    row = sampler.sample([prompt], 1, params, [3], num_reusable=len)[0][0]
    pool = sampler.machine.rows.pool
    held = pool.pages - 1 - len(pool.free)
    assert held == 11 + 3  # 41 tokens of the prompt, 11 of the completion: the last is not computed
    sampler.sample([[*prompt, *row.token_ids[:11]]], 16, params, [4])
    assert sum(pool.holders > 0) == held


def test_the_cache_keeps_to_its_budget_and_forgets_at_sync():
    policy, params = fresh("qwen3"), SamplingParams(max_new_tokens=8, stop_token_ids=())
    page = CacheShape.of(policy).token_bytes * 4
    sampler = TransformersSampler(policy, keep_mb=5 * page / 2**20, paged=True)
    sampler.sample([[5, 6, 7, 8]], 5, params, [1], num_reusable=len)
    pool = sampler.machine.rows.pool
    assert sampler.prefix_cache.bytes == 5 * page  # the prompt's page and twice 7 tokens
    assert pool.pages - 1 - len(pool.free) == 5
    sampler.sync(policy)
    assert_all_pages_are_back(sampler)


def test_new_weights_are_used():
    policy, params = fresh("qwen3"), SamplingParams(max_new_tokens=8, stop_token_ids=())
    ours, other = both(policy)
    ours.sample(PROMPTS, 2, params, SEEDS, num_reusable=len)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    ours.sync(policy)
    assert_same(ours.sample(PROMPTS, 2, params, SEEDS), other.sample(PROMPTS, 2, params, SEEDS))


def test_an_update_has_the_memory():
    """Asleep it holds neither pages nor copies of weights, and what it draws next is the same."""
    policy, params = fresh("qwen3"), SamplingParams(max_new_tokens=8, stop_token_ids=())
    policy.autocast = torch.bfloat16
    sampler = TransformersSampler(policy, paged=True)
    first = sampler.sample(PROMPTS, 2, params, SEEDS, num_reusable=len)
    rest(sampler)
    assert sampler.machine.rows is sampler.machine.steps is sampler.machine.weights is None
    assert len(sampler.prefix_cache) == 0
    assert_same(sampler.sample(PROMPTS, 2, params, SEEDS, num_reusable=len), first)
    rest(sampler)
    rest(sampler)


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("pages", [9, 14, 30])
def test_with_few_pages_rows_wait(monkeypatch, caplog, pages):
    """Rows are put back when pages run out, and draw the same tokens again."""
    policy = fresh("qwen2")
    page = CacheShape.of(policy).token_bytes * 4
    put_back = []
    back = PagedDecoding._put_back
    monkeypatch.setattr(PagedDecoding, "_put_back", lambda self, *given: put_back.append(1) or back(self, *given))
    monkeypatch.setattr(machine, "free_bytes", lambda device: 2 * pages * page)
    params = SamplingParams(max_new_tokens=19, stop_token_ids=STOPS[:3])
    ours, other = both(policy)
    found = ours.sample(PROMPTS, 4, params, SEEDS, num_reusable=len)
    assert ours.machine.rows.pool.pages == pages
    assert "fewer rows" in caplog.text
    assert_same(found, other.sample(PROMPTS, 4, params, SEEDS))
    assert put_back
    assert_all_pages_are_back(ours)


def test_what_does_not_fit_even_alone_is_refused(monkeypatch):
    policy = fresh("qwen2")
    page = CacheShape.of(policy).token_bytes * 4
    monkeypatch.setattr(machine, "free_bytes", lambda device: 2 * 7 * page)
    with pytest.raises(UserError, match="a prompt of 9 tokens and 19 new ones take"):
        TransformersSampler(policy, paged=True).sample(PROMPTS, 4, SamplingParams(max_new_tokens=19), SEEDS)


def test_the_log_says_which_form():
    """Pages on CUDA; rows that grow on a CPU; and other scoring forms have no pages."""
    policy = fresh("qwen2")
    assert not decodes_in_pages(policy)
    policy.compute_device = torch.device("cuda", 0)
    assert decodes_in_pages(policy)
    policy.scoring_form = "plain"
    assert not decodes_in_pages(policy)


def test_numbers_that_are_not_finite_do_not_outlive_their_call():
    """Masked slots are read: what a damaged model has written must not be there for the next one."""
    policy, params = fresh("qwen3"), SamplingParams(max_new_tokens=8, stop_token_ids=())
    ours, other = both(policy)
    weight = policy.model.model.layers[0].self_attn.v_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        ours.sample(PROMPTS, 2, params, SEEDS)
    with torch.no_grad():
        weight.copy_(kept)
    assert_same(ours.sample(PROMPTS, 2, params, SEEDS), other.sample(PROMPTS, 2, params, SEEDS))


def test_memory_is_what_the_formula_says():
    shape = CacheShape.of(fresh("qwen3"))
    pool = PagePool(shape, 7, 4, torch.device("cpu"))
    assert pool.data.nbytes + pool.fill.nbytes + pool.start.nbytes == paged.pool_bytes(shape, 7, 4)


# ------------------------------------------------------------------ autocast


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_autocast_computes_with_copies_of_linear_weights(family):
    """The same arithmetic as autocast itself, and the weights are the policy's own again afterwards."""
    policy = fresh(family)
    policy.autocast = torch.bfloat16
    params = SamplingParams(max_new_tokens=12, stop_token_ids=())
    weights = dict(policy.named_parameters())
    ours, other = both(policy)
    found, expected = (sampler.sample(PROMPTS, 2, params, SEEDS) for sampler in (ours, other))
    for name, weight in policy.named_parameters():
        assert weight is weights[name]
    assert ours.machine.weights.copies
    first = [[row.columns["rollout_logprobs"][0] for group in groups for row in group] for groups in (found, expected)]
    assert first[0] == pytest.approx(first[1], abs=1e-6)
    with policy.autocast_context(), torch.inference_mode():
        expected_hidden = policy.model(torch.tensor([PROMPTS[2]])).logits
        with ours.machine.weights.in_use():
            assert torch.equal(policy.model(torch.tensor([PROMPTS[2]])).logits, expected_hidden)


# ------------------------------------------------------------------ flex_attention


def pages_at_random(group: int, seed: int = 0) -> tuple[PagePool, torch.Tensor, tuple]:
    pool = PagePool(CacheShape(2, 2, 16, torch.float32), 12, 128, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    pool.data.copy_(torch.randn(pool.data.shape, generator=generator))
    pool.describe(
        range(12), [1, 128, 60, 128, 7, 128, 1, 128, 128, 128, 100, 3], [0, 0, 128, 0, 0, 0, 128, 0, 0, 0, 128, 0]
    )
    table = torch.zeros(5, 12, dtype=torch.int32)  # torch's form for CPUs wants room for all pages
    table[:, :3] = torch.tensor([[1, 2, 0], [3, 10, 0], [3, 10, 11], [0, 0, 0], [4, 0, 0]])
    num_pages = torch.tensor([2, 2, 3, 1, 1], dtype=torch.int32)
    position = torch.tensor([187, 227, 230, 0, 6])
    query = torch.randn(5, 2, group, 16, generator=generator)
    return pool, query, (table, num_pages, position, position)


RULES = [
    AttentionRule(0.25),
    AttentionRule(0.25, window=100),
    AttentionRule(0.25, cap=2.0),
    AttentionRule(0.3, 50, 3.0),
]


@pytest.mark.parametrize("group", [1, 4, 6, 7])
@pytest.mark.parametrize("rule", RULES, ids=["full", "window", "cap", "both"])
def test_flex_attention_reads_pages_as_the_reference_does(monkeypatch, group, rule):
    """torch's own slow form of flex_attention, with the block mask that the kernel is given."""
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    pool, query, given = pages_at_random(group)
    flex = FlexPages(compiled=False)
    attend = flex.attend
    flex.attend = lambda query, keys, values, mask, *rest: attend(query, keys, values, listed_only(mask), *rest)
    found, expected = (attention(PagedStep(pool, *given, attention), 0, query, rule) for attention in (flex, reference))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert rule.window or not torch.allclose(found[1], found[2])  # another page, another output


def listed_only(mask: BlockMask) -> BlockMask:
    """The slow form reads all blocks, whether they are listed or not, so the mask has to say it."""
    number = torch.arange(mask.kv_indices.shape[-1])
    listed = torch.zeros(len(mask.kv_indices), len(number), dtype=torch.bool)
    for row, (count, blocks) in enumerate(zip(mask.kv_num_blocks.flatten(), mask.kv_indices[:, 0, 0], strict=True)):
        listed[row, blocks[:count].long()] = True
    width, visible = mask.BLOCK_SIZE[1], mask.mask_mod
    return BlockMask.from_kv_blocks(
        mask.kv_num_blocks,
        mask.kv_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=lambda row, head, query, slot: visible(row, head, query, slot) & listed[row, slot // width],
        seq_lengths=mask.seq_lengths,
        compute_q_blocks=False,
    )


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_flex_attention_reads_pages_as_the_reference_does():
    """The kernel of torch's compiler for CPUs; other pages, positions and layers do not compile it again."""
    if shutil.which("g++") is None:
        pytest.skip("torch compiles flex_attention with g++")
    flex, rule = FlexPages(compiled=True), AttentionRule(0.25, 100, 3.0)
    compiled = []
    for group in (7, 7, 6):
        for layer in (0, 1):
            pool, query, given = pages_at_random(group, seed=len(compiled))
            found, expected = (
                attention(PagedStep(pool, *given, attention), layer, query, rule) for attention in (flex, reference)
            )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            compiled.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[3] == compiled[4] - 1

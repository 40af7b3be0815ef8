"""The pieces of forest attention: packing, block kernels forward and backward, merging."""

from itertools import pairwise

import pytest
import torch
from tiny_models import random_trees

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy import kernels, packing
from stepcredit.policy.batching import cheapest_batches
from stepcredit.policy.kernels import FUSED, PLAIN, AttentionRule, fused_agrees, hide, kernel_for, merge
from stepcredit.policy.packing import Packing

shapes = pytest.mark.parametrize("deep", [False, True], ids=["flat", "deep"])
HEADS, KV_HEADS, SIZE = 4, 2, 8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def numbered_forest(seed: int, deep: bool) -> Forest:
    """A random forest in which no token id occurs twice."""
    trees, number = random_trees(seed, deep), iter(range(10**6))
    for tree in trees:
        tree.prompt_ids = [next(number) for _ in tree.prompt_ids]
        for segment in tree.segments:
            segment.token_ids = [next(number) for _ in segment.token_ids]
    return Forest.from_trees(trees)


def paths(forest: Forest) -> list[list[int]]:
    """The tokens of every completion, prompt included."""
    found = []
    for leaf in forest.ends.nonzero().squeeze(1).tolist():
        tree = forest.to_trees()[int(forest.segment["tree"][leaf])]
        ids = forest.token["token_ids"].split(forest.segment["length"].tolist())
        found.append([*tree.prompt_ids, *(int(t) for s in forest.completion_segments(leaf) for t in ids[s])])
    return found


@shapes
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alone", [1, 60, 10**9])
def test_blocks_cover_every_pair_of_a_path_once(monkeypatch, deep, seed, alone):
    """Each token meets itself and every token before it on its path exactly once, and nothing else."""
    monkeypatch.setattr(packing, "UNBATCHED_SCORES", {"cpu": alone})
    forest = numbered_forest(seed, deep)
    packed, before = Packing.of_forest(forest)
    last = {path[-1] for path in paths(forest)}
    total = len(packed.token_ids) + len(last)
    assert packed.token_ids.sort().values.tolist() == [token for token in range(total) if token not in last]
    met = torch.zeros(total, total, dtype=torch.long)
    for block in packed.blocks:
        queries, keys = (rows.take(packed.token_ids[:, None])[:, 0] for rows in (block.queries, block.keys))
        shown = torch.ones(queries.shape[0], queries.shape[1], keys.shape[1], dtype=torch.bool)
        if block.causal:
            shown = shown.tril()
        if block.queries.filled is not None:
            shown &= block.queries.filled[:, :, None]
        if block.keys.filled is not None:
            shown &= block.keys.filled[:, None]
        met.index_put_(
            (queries[:, :, None].expand_as(shown)[shown], keys[:, None].expand_as(shown)[shown]),
            torch.ones((), dtype=torch.long),
            accumulate=True,
        )
        position = torch.empty(total, dtype=torch.long)
        position[packed.token_ids] = packed.position
        distance = position[queries][:, :, None] - position[keys][:, None]
        assert block.reach >= int(distance[shown].max())
    expected = torch.zeros_like(met)
    for path in (torch.tensor(path[:-1]) for path in paths(forest)):
        expected[path[:, None], path[None]] |= torch.ones(len(path), len(path), dtype=torch.long).tril()
    assert met.equal(expected)
    previous = {token: up for path in paths(forest) for up, token in pairwise(path)}
    assert packed.token_ids[before].tolist() == [previous[token] for token in forest.token["token_ids"].tolist()]


@shapes
def test_positions_count_along_the_path(deep):
    packed, _ = Packing.of_forest(numbered_forest(7, deep))
    position = dict(zip(packed.token_ids.tolist(), packed.position.tolist(), strict=True))
    for path in paths(numbered_forest(7, deep)):
        assert [position[token] for token in path[:-1]] == list(range(len(path) - 1))


def test_only_children_join_the_run_of_their_parent():
    """Example: a dialogue of three turns is one causal square, whatever its segments."""
    segments = [Segment([3, 4]), Segment([5], parent=0, sampled=False), Segment([6, 7], parent=1)]
    packed, _ = Packing.of_forest(Forest.from_trees([Tree(Problem(), [1, 2], segments)]))
    assert packed.squares == [(0, 6)] and packed.rectangles == []


def test_last_tokens_are_left_out():
    """Completions of one token need nothing but their prompt, or what they continue, alone or not."""
    segments = [Segment([3]), Segment([4, 5], finish="cut"), Segment([6], parent=1), Segment([7], parent=1)]
    packed, before = Packing.of_forest(Forest.from_trees([Tree(Problem(), [1, 2], segments)]))
    assert packed.token_ids.tolist() == [1, 2, 4, 5] and before.tolist() == [1, 1, 2, 3, 3]
    assert sorted(packed.squares) == [(0, 2), (2, 4)] and packed.rectangles == [[(0, 2, 4)]]
    packed, before = Packing.of_forest(Forest.from_trees([Tree(Problem(), [1, 2], [Segment([3])])]))
    assert packed.token_ids.tolist() == [1, 2] and packed.squares == [(0, 2)] and before.tolist() == [1]


def test_rows_do_not_see_each_other():
    packed = Packing.of_rows([[1, 2, 3], [4], [5, 6]])
    assert packed.squares == [(0, 3), (3, 4), (4, 6)] and packed.rectangles == []
    assert packed.position.tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("overhead", [0, 5, 10**6])
def test_runs_are_a_partition_of_the_least_cost(overhead):
    """Every block once, sizes together, no dearer than each size alone or all in one."""
    sizes = [(1 + (7 * index) % 5, 1 + (3 * index) % 4) for index in range(30)]
    runs = cheapest_batches(sizes, overhead)
    assert sorted(index for run in runs for index in run) == list(range(30))

    def cost(batches: list[list[int]]) -> int:
        return sum(
            len(batch) * max(sizes[i][0] for i in batch) * max(sizes[i][1] for i in batch) + overhead
            for batch in batches
        )

    alone = [[index for index in range(30) if sizes[index] == size] for size in sorted(set(sizes))]
    assert cost(runs) <= min(cost(alone), cost([list(range(30))]))
    assert cheapest_batches([], overhead) == []


# ------------------------------------------------------------------ kernels

CASES = [
    (None, False, AttentionRule(0.3)),
    (None, True, AttentionRule(0.3)),
    ("keys", False, AttentionRule(0.3)),
    ("pairs", False, AttentionRule(0.3)),
    ("pairs", False, AttentionRule(0.3, cap=1.5)),
    (None, True, AttentionRule(0.3, cap=1.5)),
]


def operands(queries: int = 6, keys: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        random(3, HEADS, queries, SIZE),
        random(3, KV_HEADS, keys, SIZE, seed=1),
        random(3, KV_HEADS, keys, SIZE, seed=2),
    )


def a_mask(kind: str | None, queries: int, keys: int) -> torch.Tensor | None:
    if kind is None:
        return None
    visible = random(3, 1 if kind == "keys" else queries, keys) > -0.5
    visible[..., 0] = True
    return hide(visible)[:, None]


def written_out(query, key, value, causal, mask, rule):
    """Attention by its definition, keys repeated for the heads of a group."""
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * rule.scale
    scores = scores if rule.cap is None else rule.cap * torch.tanh(scores / rule.cap)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    scores = scores if mask is None else scores + mask
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.mark.parametrize(
    ("kernel", "kind", "causal", "rule"),
    [(PLAIN, *case) for case in CASES] + [(FUSED["cpu"], *case) for case in CASES if case[2].cap is None],
)
@pytest.mark.parametrize("chunk", [10, 1 << 24])
def test_a_kernel_gives_the_definition_and_its_gradient(monkeypatch, kernel, kind, causal, rule, chunk):
    """Output, log of the sum, and the gradients that autograd finds for the definition."""
    monkeypatch.setattr(kernels, "MAX_SCORES", chunk)
    tensors = [tensor.requires_grad_() for tensor in operands()]
    mask = a_mask(kind, 6, 6)
    expected, expected_lse = written_out(*tensors, causal, mask, rule)
    with torch.no_grad():
        out, lse = kernel[0](*tensors, causal, mask, rule)
    torch.testing.assert_close(out, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse.detach(), atol=1e-5, rtol=1e-5)
    grad = random(*out.shape, seed=3)
    expected_grads = torch.autograd.grad(expected, tensors, grad)
    with torch.no_grad():
        grads = kernel[1](grad, *tensors, out, lse, causal, mask, rule)
    for found, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", [PLAIN, FUSED["cpu"]], ids=["plain", "fused"])
def test_two_blocks_merge_into_one(kernel):
    """Keys split between two blocks: merged output and gradients are those of all keys at once."""
    query, key, value = operands(queries=4, keys=9)
    rule, grad = AttentionRule(0.3), random(*query.shape, seed=3)
    whole = kernel[0](query, key, value, False, None, rule)
    halves = [(key[:, :, :4], value[:, :, :4]), (key[:, :, 4:], value[:, :, 4:])]
    out, lse = merge(*kernel[0](query, *halves[0], False, None, rule), *kernel[0](query, *halves[1], False, None, rule))
    torch.testing.assert_close(out, whole[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, whole[1], atol=1e-6, rtol=1e-5)
    expected = kernel[1](grad, query, key, value, *whole, False, None, rule)
    parts = [kernel[1](grad, query, *half, out, lse, False, None, rule) for half in halves]
    torch.testing.assert_close(parts[0][0] + parts[1][0], expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]], 2), expected[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([parts[0][2], parts[1][2]], 2), expected[2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", [PLAIN, FUSED["cpu"]], ids=["plain", "fused"])
def test_a_block_without_visible_keys_weighs_nothing(kernel):
    """A query that sees no key of a block merges as if the block were not there, and stays finite."""
    query, key, value = operands()
    rule = AttentionRule(0.3)
    hidden = hide(torch.zeros(3, 1, 6, dtype=torch.bool))[:, None]
    seen = kernel[0](query, key, value, False, None, rule)
    merged = merge(*seen, *kernel[0](query, key + 1, value - 1, False, hidden, rule))
    torch.testing.assert_close(merged[0], seen[0])
    grads = kernel[1](random(*query.shape), query, key, value, *merged, False, hidden, rule)
    assert all(bool((grad == 0).all()) for grad in grads)


def test_a_fused_kernel_that_disagrees_is_not_used(monkeypatch, caplog):
    """It is compared with the plain one once; a wrong gradient or an error means the plain one, said in the log."""
    fused_agrees.cache_clear()
    query, rule = random(1, 2, 3, 8), AttentionRule(1.0)
    right = FUSED["cpu"]
    try:
        for wrong in (lambda *args: tuple(2 * grad for grad in right[1](*args)), lambda *args: None.shape):
            monkeypatch.setitem(FUSED, "cpu", (right[0], wrong))
            assert kernel_for(query, None, rule) is PLAIN
            assert "cannot be used" in caplog.text
            fused_agrees.cache_clear()
        monkeypatch.setitem(FUSED, "cpu", right)
        assert kernel_for(query, None, rule) is right
    finally:
        fused_agrees.cache_clear()


def test_a_fused_kernel_is_compared_with_the_heads_that_it_will_have(monkeypatch):
    """Example: one that is wrong for grouped heads alone is used where heads are not grouped."""
    right, query, rule = FUSED["cpu"], random(1, 6, 3, 8), AttentionRule(1.0)

    def ungrouped(query, key, *rest):
        out, lse = right[0](query, key, *rest)
        return (out if query.shape[1] == key.shape[1] else 2 * out), lse

    fused_agrees.cache_clear()
    try:
        monkeypatch.setitem(FUSED, "cpu", (ungrouped, right[1]))
        assert kernel_for(query, None, rule) is FUSED["cpu"] and kernel_for(query, None, rule, 6) is FUSED["cpu"]
        assert kernel_for(query, None, rule, 1) is PLAIN and kernel_for(query, None, rule, 3) is PLAIN
    finally:
        fused_agrees.cache_clear()

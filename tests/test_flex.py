"""Attention in one masked call: the mask, its blocks, and the same numbers as squares and rectangles."""

import shutil

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from tiny_models import fresh, gradients, random_forest, relative_distance
from torch.nn.functional import pad

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.policy import flex
from stepcredit.policy.attention import ForestPlan
from stepcredit.policy.flex import BLOCK, Heads, TreeMask, block_kinds, one_mask_agrees, padded_length
from stepcredit.policy.forward import choose_scoring_form
from stepcredit.policy.kernels import AttentionRule
from stepcredit.policy.packing import Packing
from stepcredit.policy.transfer import cut, join, send
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler

CPU = torch.device("cpu")


@pytest.fixture
def one_mask(monkeypatch):
    """CPUs compute packed rows in one masked call, not compiled; torch's own refusal of a backward there is lifted."""
    torch._dynamo.reset()
    one_mask_agrees.cache_clear()
    monkeypatch.setattr(flex, "DEVICES", ("cpu",))
    monkeypatch.setattr(flex, "compiled_attention", flex.masked_attention)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    yield
    one_mask_agrees.cache_clear()


@pytest.fixture
def traced(one_mask, monkeypatch):
    """As `one_mask`, but with forward and backward traced as for CUDA, for all lengths; only no kernels are made."""
    compiled = torch.compile(flex.masked_attention, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(flex, "compiled_attention", compiled)
    torch._dynamo.utils.counters.clear()
    return compiled


def num_graphs() -> int:
    """Traced since the beginning of the test."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def branching(seed: int, lengths: tuple[int, int], num_segments: int, deep: bool, num_trees: int = 2) -> Forest:
    """Ragged trees with segments of lengths in a range: groups, or branching at random."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def tokens() -> list[int]:
        return [1] * whole(*lengths)

    trees = []
    for _ in range(num_trees):
        segments = [Segment(tokens(), parent=whole(-1, index - 1) if deep else -1) for index in range(num_segments)]
        trees.append(Tree(Problem(), tokens(), segments))
    return Forest.from_trees(trees)


FORESTS = {
    "one token": lambda: Forest.from_trees([Tree(Problem(), [1], [Segment([1])])]),
    "group": lambda: branching(0, (40, 40), 6, deep=False),
    "ragged group": lambda: branching(1, (1, 150), 5, deep=False),
    "tree": lambda: branching(2, (20, 60), 12, deep=True, num_trees=1),
    "ragged trees": lambda: branching(3, (1, 90), 7, deep=True),
    "many small": lambda: branching(4, (1, 5), 4, deep=True, num_trees=30),
}
forests = pytest.mark.parametrize("name", FORESTS)
windows = pytest.mark.parametrize("window", [None, 1, 30, 128, 1000])


def packed(name: str, devices: tuple[str, ...] = ("cpu",)) -> Packing:
    """The row of a forest, padded as a device with one masked call has it, or not."""
    return row(lambda: Packing.of_forest(FORESTS[name]())[0], devices)


def row(make, devices: tuple[str, ...] = ("cpu",)) -> Packing:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "DEVICES", devices)
        return make()


def by_blocks(packing: Packing, window: int | None = None) -> torch.Tensor:
    """What each query sees according to squares and rectangles, [length, length] bool."""
    length = len(packing.position_on_cpu)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for first, end in packing.squares:
        seen[first:end, first:end] = torch.ones(end - first, end - first).tril().bool()
    for level in packing.rectangles:
        for first, end, last in level:
            seen[end:last, first:end] = True
    position = packing.position_on_cpu
    return seen if window is None else seen & (position[:, None] - position < window)


# ------------------------------------------------------------------ the mask


@forests
def test_end_is_the_mask_of_squares_and_rectangles(name):
    packing = packed(name)
    query, key = torch.arange(len(packing.end))[:, None], torch.arange(len(packing.end))
    assert packing.end.dtype == torch.int32
    assert ((key <= query) & (query < packing.end)).equal(by_blocks(packing))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("deep", [False, True], ids=["flat", "deep"])
def test_end_is_the_mask_of_random_forests(seed, deep):
    packing, _ = Packing.of_forest(random_forest(seed, deep))
    query, key = torch.arange(len(packing.end))[:, None], torch.arange(len(packing.end))
    assert ((key <= query) & (query < packing.end)).equal(by_blocks(packing))


def test_rows_that_do_not_see_each_other():
    packing = Packing.of_rows([[1, 2, 3], [4], [5, 6]])
    assert packing.end.tolist() == [3, 3, 3, 4, 6, 6]


@forests
@windows
def test_no_block_is_skipped_or_taken_for_full(name, window):
    """Blocks that are left out hold nothing visible, full ones nothing hidden; without a window both are exact."""
    packing = packed(name)
    partial, full = block_kinds(packing.end, packing.position_on_cpu, window)
    blocks = by_blocks(packing, window).view(len(partial), BLOCK, len(partial), BLOCK).transpose(1, 2).flatten(2)
    some, every = blocks.any(2), blocks.all(2)
    assert not (partial & full).any() and not (some & ~partial & ~full).any() and not (full & ~every).any()
    if window is None:
        assert (partial | full).equal(some) and full.equal(every)


def test_a_window_leaves_out_what_is_far_back():
    """Example: of one long path only the blocks on and beside the diagonal are computed; none is full."""
    packing = row(lambda: Packing.of_rows([[1] * 1000]))
    partial, full = block_kinds(packing.end, packing.position_on_cpu, 100)
    assert not full.any() and int(partial.sum()) == 15
    _, full = block_kinds(packing.end, packing.position_on_cpu, 400)
    assert int(full.sum()) > 0


@forests
@windows
def test_lists_of_blocks_are_the_kinds(name, window):
    """By queries and, for the backward, by keys; as torch itself turns the one into the other."""
    packing = packed(name)
    partial, full = block_kinds(packing.end, packing.position_on_cpu, window)
    mask = TreeMask.of(packing.end, packing.position_on_cpu, window, CPU)
    for kind, count, listed in zip(
        (partial, full, partial.T, full.T), mask.blocks[::2], mask.blocks[1::2], strict=True
    ):
        assert torch_flex._ordered_to_dense(count, listed, len(kind))[0, 0].bool().equal(kind)
        assert count.dtype == listed.dtype == torch.int32 and listed.is_contiguous()


def test_length_of_a_row():
    """Whole blocks, two at least, where attention is one call; elsewhere nothing is added."""
    assert [padded_length(n, torch.device("cuda", 1)) for n in (1, 128, 256, 257, 4096)] == [256, 256, 256, 384, 4096]
    assert padded_length(17, CPU) == 17


# ------------------------------------------------------------------ the call


def both(make, count: int, kv_count: int, size: int, rule: AttentionRule, dtype=torch.float32):
    """Output and gradients by squares and rectangles in fp32, and by the masked call; the row's real length."""
    results = []
    for devices, kind in (((), torch.float32), (("cpu",), dtype)):
        packing, generator = row(make, devices), torch.Generator().manual_seed(0)
        length = packing.num_positions
        extra = len(packing.position_on_cpu) - length
        shapes = [(1, n, length, size) for n in (count, kv_count, kv_count)]
        given = [torch.randn(shape, generator=generator) for shape in shapes]
        inputs = [pad(tensor, (0, 0, 0, extra), value=3.0).to(kind).requires_grad_() for tensor in given]
        grad = pad(torch.randn(1, length, count, size, generator=generator), (0, 0, 0, 0, 0, extra), value=2.0).to(kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flex, "DEVICES", devices)
            patch.setattr(flex, "one_mask_agrees", lambda *args: True)
            out = ForestPlan(packing).attend(0, *inputs, rule)
        results.append((out, *(tensor.transpose(1, 2) for tensor in torch.autograd.grad(out, inputs, grad))))
    return *results, length


def assert_same(expected, actual, length: int, tolerance: float) -> None:
    for number, (want, got) in enumerate(zip(expected, actual, strict=True)):
        distance, size = (tensor.detach().norm() for tensor in (got[:, :length].float() - want, want))
        assert distance < tolerance * max(1, size), number  # the gradient of a query that sees one key is 0
        assert bool((got[:, length:] == 0).all()), number


CASES = [
    ("one token", 4, 2, 16, AttentionRule(0.25)),
    ("group", 4, 4, 64, AttentionRule(0.125)),
    ("ragged group", 4, 2, 80, AttentionRule(0.1)),
    ("tree", 4, 1, 96, AttentionRule(0.1, window=25)),
    ("ragged trees", 6, 1, 128, AttentionRule(0.09)),
    ("ragged trees", 7, 1, 64, AttentionRule(0.125, window=130)),
    ("many small", 2, 1, 256, AttentionRule(0.06)),
    ("tree", 4, 2, 256, AttentionRule(0.06, cap=5.0)),
    ("ragged group", 4, 2, 64, AttentionRule(0.2, window=40, cap=2.0)),
]


@pytest.mark.parametrize(("name", "count", "kv_count", "size", "rule"), CASES)
def test_the_masked_call_gives_what_blocks_give(one_mask, name, count, kv_count, size, rule):
    """Output and gradients; padding sees nothing, is seen by nothing, and gets zeros, whatever stands in it."""
    assert_same(*both(lambda: Packing.of_forest(FORESTS[name]())[0], count, kv_count, size, rule), 1e-5)


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 255, 256, 257, 600])
def test_any_length(one_mask, length):
    rows = [[1] * (length - length // 3), [1] * (length // 3)] if length > 2 else [[1] * length]
    assert_same(*both(lambda: Packing.of_rows(rows), 4, 2, 32, AttentionRule(0.2)), 1e-5)


def test_half_precision(one_mask):
    """Within the rounding of bf16 of what blocks give in fp32."""
    make = lambda: Packing.of_forest(FORESTS["ragged trees"]())[0]  # noqa: E731
    assert_same(*both(make, 4, 2, 64, AttentionRule(0.125), torch.bfloat16), 2e-2)


def test_tensors_joined_and_cut_are_the_same():
    """Of any type and shape, empty ones too, in one buffer; on a CPU nothing is copied."""
    tensors = [torch.arange(7), torch.tensor([True, False, True]), torch.zeros(0, dtype=torch.int32)]
    tensors += [torch.randn(3, 5).T, torch.tensor(2.5), torch.arange(6, dtype=torch.int32).view(1, 2, 3)]
    back = cut(join(tensors), tensors)
    assert all(new.equal(old) and new.dtype == old.dtype for new, old in zip(back, tensors, strict=True))
    assert len({new.untyped_storage().data_ptr() for new in back if new.numel()}) == 1
    assert all(new is old for new, old in zip(send(tensors, CPU), tensors, strict=True))
    assert [new.shape for new in send(tensors, "meta")] == [old.shape for old in tensors]


# ------------------------------------------------------------------ whether it is right


GROUPED = Heads(4, 2, 16, 0.25, False, None)
ALL_HEADS = [
    GROUPED,
    Heads(7, 1, 32, 0.2, True, None),
    Heads(3, 3, 24, 0.2, False, 2.0),
    Heads(2, 1, 256, 0.06, True, 5.0),
]


@pytest.mark.parametrize("heads", ALL_HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_call_agrees(one_mask, caplog, heads, dtype):
    """Wherever it is tried first, in a sampler's inference mode under autocast too."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert one_mask_agrees(CPU, dtype, heads) and not said(caplog)


def said(caplog) -> list[str]:
    """The package's own warnings; torch's compiler logs too."""
    return [record.getMessage() for record in caplog.records if record.name == "stepcredit"]


def scaled(factor):
    return lambda *args: factor * flex.masked_attention(*args)


def leaking(query, key, value, end, *rest):
    return flex.masked_attention(query, key, value, end.clamp(min=len(end)), *rest)


def steep(query, *rest):
    out = flex.masked_attention(query, *rest)
    return out.detach() + (out - out.detach()) * 1.5 if query.requires_grad else out


def failing(*args):
    raise RuntimeError("out of shared memory\nat line 3")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (scaled(1.1), "its output differs"),
        (scaled(float("nan")), "its output differs"),
        (leaking, "its output differs"),
        (steep, "its gradient of queries differs"),
        (failing, "RuntimeError: out of shared memory"),
    ],
    ids=["scaled", "nan", "leaking", "steep", "failing"],
)
def test_a_wrong_call_is_not_used(one_mask, monkeypatch, caplog, wrong, why):
    """Squares and rectangles take over, on the padded row too; the log says once why."""
    monkeypatch.setattr(flex, "compiled_attention", wrong)
    policy, forest = fresh("qwen2"), random_forest(3, deep=True)
    found = policy(forest)
    (message,) = said(caplog)
    assert "one masked call cannot be used" in message and why in message and "line 3" not in message
    monkeypatch.setattr(flex, "DEVICES", ())
    expected = policy(forest)
    assert found.logprobs.equal(expected.logprobs)
    weight = torch.arange(forest.num_tokens) / 10
    first, second = (gradients(policy, (weight * scores.logprobs).sum()) for scores in (found, expected))
    assert relative_distance(first, second) < 1e-6


# ------------------------------------------------------------------ whole models


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_model_scores_the_same_in_both_ways(traced, monkeypatch, family):
    """Log-probabilities and all gradients of forests of several sizes, with layers computed again in the backward too;
    all is traced when the call is tried first."""
    policy, calls = fresh(family), []
    monkeypatch.setattr(flex, "compiled_attention", lambda *args: calls.append(1) or traced(*args))
    policy(random_forest(5, deep=True))
    num_layers, graphs = policy.model.config.num_hidden_layers, num_graphs()
    assert graphs == (4 if family == "gemma2" else 2)  # kinds of layers, with and without gradient
    calls.clear()
    for seed, again in ((6, False), (7, False), (7, True)):
        if again:
            policy.checkpoint_layers()
        forest = random_forest(seed, deep=True, num_trees=8 * (seed - 5))
        weight = torch.randn(forest.num_tokens, generator=torch.Generator().manual_seed(0))
        results = []
        for devices in (("cpu",), ()):
            monkeypatch.setattr(flex, "DEVICES", devices)
            scores = policy(forest)
            results.append((scores.logprobs.detach(), gradients(policy, (weight * scores.logprobs).sum())))
            assert len(calls) == num_layers * (1 + again) * len(devices)
            calls.clear()
        torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
        assert relative_distance(results[0][1], results[1][1]) < 1e-5
    assert num_graphs() == graphs


def test_a_mask_is_made_once_for_all_layers(one_mask, monkeypatch):
    """One for each window of a model, whatever the number of its layers."""
    made = []
    whole = TreeMask.of.__func__
    monkeypatch.setattr(TreeMask, "of", classmethod(lambda cls, *args: made.append(args[2]) or whole(cls, *args)))
    monkeypatch.setattr(flex, "one_mask_agrees", lambda *args: True)
    fresh("gemma2")(random_forest(6, deep=True))
    assert sorted(made, key=str) == [5, None]


def test_a_policy_is_checked_as_it_will_train(traced, caplog):
    """In bf16 with gradients by the masked call; it stays as it was."""
    policy = fresh("llama")
    policy.autocast = torch.bfloat16
    policy.model.lm_head.requires_grad_(False)
    with caplog.at_level("INFO", "stepcredit"):
        assert choose_scoring_form(policy) < 1e-5
    assert policy.scoring_form == "forest" and policy.autocast == torch.bfloat16 and "forest form" in caplog.text
    frozen = [name for name, weight in policy.named_parameters() if not weight.requires_grad]
    assert frozen == ["model.lm_head.weight"] and all(weight.grad is None for weight in policy.parameters())


def test_samples_are_the_same(traced, monkeypatch):
    """Prompts encoded by the masked call, in inference mode: the same greedy completions."""
    policy, prompts = fresh("gemma2"), [[5, 6, 7], [8] * 20, [9]]
    sampler = TransformersSampler(policy)
    params = SamplingParams(temperature=0, max_new_tokens=12)
    found = sampler.sample(prompts, 1, params, [1, 2, 3])
    monkeypatch.setattr(flex, "DEVICES", ())
    sampler.sync(policy)
    expected = sampler.sample(prompts, 1, params, [1, 2, 3])
    assert [one.token_ids for many in found for one in many] == [one.token_ids for many in expected for one in many]


# ------------------------------------------------------------------ compiled


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_once_for_all_lengths():
    """The very function that CUDA compiles, forward (a CPU has no compiled backward): rows of any length, one
    compilation, and one more in a sampler's inference mode."""
    torch._dynamo.reset()
    rule = AttentionRule(0.2, cap=3.0)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for mode, lengths in ((torch.no_grad(), (300, 100, 600, 1000)), (torch.inference_mode(), (129, 400))):
        with mode:
            for length in lengths:
                rows = [[1] * (length // 2)] * 2
                packing, generator = row(lambda: Packing.of_rows(rows)), torch.Generator().manual_seed(0)  # noqa: B023
                shapes = [(1, n, len(packing.end), 16) for n in (6, 1, 1)]
                query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
                found = flex.attend(query, key, value, ForestPlan(packing).tree_mask(None), rule).transpose(1, 2)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(flex, "DEVICES", ())
                    expected = ForestPlan(packing).attend(0, query, key, value, rule)
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2

"""The pretend device against what a real one does: it finds what it is there to find.

python -m pretend.checks LIBRARY
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretend.build import load


def refused(call: Callable[[], Any], *said: str) -> None:
    try:
        call()
    except RuntimeError as error:
        assert all(text in str(error) for text in said), error
    else:
        raise AssertionError(f"not refused: {said}")


def check_tensors() -> None:
    import torch

    numbers = torch.arange(6.0, device="cuda").view(2, 3)
    weight = torch.randn(3, 4).to("cuda").requires_grad_()
    (numbers @ weight).sum().backward()
    assert weight.grad is not None and weight.grad.is_cuda
    assert weight.grad.cpu().equal(torch.tensor([3.0, 5.0, 7.0])[:, None].expand(3, 4))
    with torch.autocast("cuda", torch.bfloat16):
        assert (numbers @ weight).dtype == torch.bfloat16
    tied = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    tied[1].weight = tied[0].weight
    copied = copy.deepcopy(tied.cuda())
    assert copied[0].weight is copied[1].weight and copied[0].weight.is_cuda
    row = numbers[0]
    row.add_(1)
    assert numbers.tolist() == [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]
    assert torch.empty(3, device="cuda").isnan().all()
    refused(lambda: numbers + torch.zeros(3), "same device")
    refused(lambda: numbers.index_select(0, torch.tensor([0])), "same device", "index_select")
    assert numbers[torch.tensor([1])].is_cuda  # CUDA takes indices of the host


def check_kernels() -> None:
    import torch

    flash, size = torch.ops.aten._scaled_dot_product_flash_attention, (1, 2, 5, 16)
    half = torch.randn(size, device="cuda").to(torch.bfloat16)
    out, lse, *_ = flash(half, half, half, 0.0, True)
    expected = torch.nn.functional.scaled_dot_product_attention(*3 * [half.cpu().float()], is_causal=True)
    torch.testing.assert_close(out.cpu().float(), expected, atol=2e-2, rtol=2e-2)
    assert lse.dtype == torch.float32 and lse.shape == size[:3]
    refused(lambda: flash(*3 * [half.float()], 0.0, True), "refuse", "float32")
    refused(lambda: flash(*3 * [half.mT], 0.0, True), "refuse", "strides")
    left, right = half[0, 0], half[0, 1].T
    torch.testing.assert_close(
        torch.mm(left, right, out_dtype=torch.float32).cpu(), left.cpu().float() @ right.cpu().float()
    )
    refused(lambda: torch.mm(left, right.float(), out_dtype=torch.float32), "refuse", "bfloat16 and torch.float32")
    value = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.AdamW([value], lr=0.1, fused=True)
    value.sum().backward()
    optimizer.step()
    assert (value < 1).all() and optimizer.state[value]["step"].is_cuda
    optimizer.state[value]["step"] = optimizer.state[value]["step"].cpu()
    refused(optimizer.step, "on cpu")


def check_flex() -> None:
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    length, size = 256, 16
    shapes = [(1, 4, length, size), *2 * [(1, 2, length, size)]]
    given = [torch.randn(shape).to("cuda").requires_grad_() for shape in shapes]
    one, two = torch.tensor([[[1, 1]]], dtype=torch.int32), torch.tensor([[[0, 1]]], dtype=torch.int32)
    diagonal, below = torch.tensor([[[[0], [1]]]], dtype=torch.int32), torch.tensor([[[[0], [0]]]], dtype=torch.int32)
    after = torch.tensor([[[1, 0]]], dtype=torch.int32)
    end = torch.full((length,), length, device="cuda")

    def causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & (query < end[key])

    def masked(q_diagonal: Any, q_below: Any) -> Any:
        partial, full = (one, diagonal), (two, below)
        lists = [tensor.cuda() for tensor in (*partial, *full, one, q_diagonal, after, q_below)]
        mask = BlockMask((length, length), *lists, BLOCK_SIZE=(128, 128), mask_mod=causal)
        return flex_attention(*given, block_mask=mask, enable_gqa=True)

    out = masked(diagonal, torch.ones_like(below))
    exact = [tensor.detach().cpu().requires_grad_() for tensor in given]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    grad = torch.randn(out.shape)
    grads, wanted = torch.autograd.grad(out, given, grad.cuda()), torch.autograd.grad(expected, exact, grad)
    for actual, right in zip((out, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(actual.cpu(), right, atol=1e-5, rtol=1e-5)
    wrong = masked(diagonal, below)  # the transposed list names another block
    refused(lambda: torch.autograd.grad(wrong.sum(), given), "blocks for the backward")
    refused(lambda: flex_attention(given[0].cpu(), *given[1:], block_mask=masked), "refuse")


def check_waits(observer: Any) -> None:
    import torch

    numbers = torch.arange(4, device="cuda")
    host, pinned = torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long).pin_memory()
    mask = numbers > 1

    def waits(call: Callable[[], Any]) -> int:
        observer.clear()
        call()
        return observer.waits.total()

    waiting: list[Callable[[], Any]] = [
        lambda: numbers[0].item(),
        lambda: bool(mask.any()),
        numbers.tolist,
        numbers.cpu,
        lambda: numbers.to("cpu"),
        lambda: host.to("cuda"),
        lambda: host.to("cuda", non_blocking=True),  # pageable memory is copied into pinned memory first
        lambda: torch.tensor([1, 2], device="cuda"),
        mask.nonzero,
        lambda: numbers[mask],
        lambda: numbers[torch.tensor([0])],
        lambda: numbers.copy_(pinned),
        torch.cuda.synchronize,
    ]
    free: list[Callable[[], Any]] = [
        lambda: pinned.to("cuda", non_blocking=True),
        lambda: numbers.copy_(pinned, non_blocking=True),
        lambda: pinned.copy_(numbers, non_blocking=True),
        lambda: numbers.clone() + 1,
        lambda: numbers[numbers],
        lambda: numbers.masked_fill(mask, 0),
        lambda: len(numbers) + numbers.numel(),
        lambda: torch.zeros(3, device="cuda"),
    ]
    for inference in (False, True):
        with torch.inference_mode(inference):
            assert [waits(call) for call in waiting] == [1] * len(waiting)
            assert [waits(call) for call in free] == [0] * len(free)


def check_graphs(observer: Any) -> None:
    import torch

    given, total = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        doubled = given * 2
        total += doubled
    assert total.tolist() == [0.0] * 3  # a capture computes nothing
    observer.clear()
    for number in (1.0, 2.0):
        given.fill_(number)
        graph.replay()
    assert doubled.tolist() == [4.0] * 3 and total.tolist() == [6.0] * 3
    assert observer.launches["graph replay"] == 2 and "mul.Tensor" not in observer.launches

    def waits_inside() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            given.sum().item()

    refused(waits_inside, "capturing")


def main() -> None:
    from pretend.install import install

    observer = install()
    with observer:
        check_tensors()
        check_kernels()
        check_flex()
        check_waits(observer)
        check_graphs(observer)


if __name__ == "__main__":
    load(Path(sys.argv[1]))
    main()

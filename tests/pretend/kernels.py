"""Stand-ins for kernels that torch has for CUDA alone, or with other operands than on a CPU.

Each checks what the kernel of CUDA asks of its operands and computes the result on the CPU. To add one, write it and
name it in `STAND_INS`: it gets the operator's arguments, tensors on the pretend device among them, and returns tensors
on that device. `cpu` gives the same memory as a CPU tensor, so that what is written into it is on the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
FLASH, MATH = 1, 0  # of SDPBackend


def cpu(tensor: Tensor) -> Tensor:
    return torch.ops.pretend.on_cpu(tensor)


def cuda(tensor: Tensor) -> Tensor:
    return torch.ops.pretend.on_cuda(tensor.contiguous())


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"a CUDA kernel would refuse this: {what}")


# ------------------------------------------------------------------ attention


def check_flash(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Half precision, heads of at most 256 numbers in a row, a divisor of the query's heads for keys and values."""
    for tensor in (query, key, value):
        demand(tensor.is_cuda and tensor.dtype in HALF, f"flash attention of {tensor.dtype} on {tensor.device}")
        demand(tensor.dtype == query.dtype, f"flash attention of {query.dtype} with {tensor.dtype}")
        demand(tensor.dim() == 4 and tensor.stride(-1) == 1, f"flash attention with strides {tensor.stride()}")
        demand(tensor.shape[-1] <= 256 and tensor.shape[-1] % 8 == 0, f"flash attention of size {tensor.shape[-1]}")
    demand(query.shape[1] % key.shape[1] == 0, f"{query.shape[1]} heads over {key.shape[1]}")
    demand(min(query.numel(), key.numel()) > 0, "flash attention without queries or keys")


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    check_flash(query, key, value)
    demand(dropout_p == 0.0, "the stand-in has no dropout")
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        cpu(query), cpu(key), cpu(value), 0.0, is_causal, scale=scale
    )
    seed = torch.zeros(2, dtype=torch.uint64)
    rest = (query.shape[2], key.shape[2], cuda(seed), cuda(seed[:0]), cuda(torch.empty(0, dtype=query.dtype)))
    return cuda(out), cuda(lse.float()), None, None, *rest


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_flash(query, key, value)
    for tensor in (grad_out, out):
        demand(tensor.dtype == query.dtype and tensor.stride(-1) == 1, "flash backward of another type or stride")
        demand(tensor.shape == query.shape, f"flash backward of {tuple(tensor.shape)} for {tuple(query.shape)}")
    demand(logsumexp.dtype == torch.float32 and logsumexp.is_contiguous(), "flash backward with another logsumexp")
    demand(cum_seq_q is None and cum_seq_k is None, "the stand-in has no rows of several lengths")
    demand((max_q, max_k) == (query.shape[2], key.shape[2]), "flash backward with other lengths")
    tensors = (cpu(tensor) for tensor in (grad_out, query, key, value, out, logsumexp))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, is_causal, scale=scale)
    return cuda(grads[0]), cuda(grads[1]), cuda(grads[2])


def choose_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> int:
    """What `scaled_dot_product_attention` takes: flash attention where it can, else products of matrices."""
    fits = attn_mask is None and query.dtype in HALF and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return FLASH if fits else MATH


# ------------------------------------------------------------------ products with a type of their own


def check_product(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> None:
    demand(left.is_cuda and right.is_cuda, "a product of operands that are not both on the device")
    demand(left.dtype == right.dtype, f"a product of {left.dtype} and {right.dtype}")
    allowed = out_dtype == left.dtype or (out_dtype == torch.float32 and left.dtype in HALF)
    demand(allowed, f"a product of {left.dtype} in {out_dtype}")


def product(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    check_product(left, right, out_dtype)
    return cuda(torch.matmul(cpu(left).to(out_dtype), cpu(right).to(out_dtype)))


def product_out(left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    demand(out.is_cuda and out.dtype == out_dtype, f"a product in {out_dtype} into {out.dtype}")
    return out.copy_(product(left, right, out_dtype))


def sum_product(
    total: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    check_product(left, right, out_dtype)
    demand(total.is_cuda and total.dtype in (out_dtype, left.dtype), f"a product in {out_dtype} added to {total.dtype}")
    added = torch.matmul(cpu(left).to(out_dtype), cpu(right).to(out_dtype)) * alpha
    return cuda(added if beta == 0 else added + beta * cpu(total).to(out_dtype))


def sum_product_out(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor,
) -> Tensor:
    demand(out.is_cuda and out.dtype == out_dtype, f"a product in {out_dtype} into {out.dtype}")
    return out.copy_(sum_product(total, left, right, out_dtype, beta=beta, alpha=alpha))


# ------------------------------------------------------------------ AdamW


def fused_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    **options: Any,
) -> None:
    """All on the device, the numbers of steps too; the scale of gradients and the flag that skips a step also."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps)
    others = {name: value for name, value in options.items() if isinstance(value, Tensor)}
    for tensor in (*(tensor for tensors in lists for tensor in tensors), *others.values()):
        demand(tensor.is_cuda, f"fused AdamW with a tensor on {tensor.device}")
    demand(all(step.dtype == torch.float32 for step in state_steps), "fused AdamW counts steps in fp32")
    demand(all(len(tensors) == len(params) for tensors in (grads, exp_avgs, exp_avg_sqs)), "lists of several lengths")
    given = options | {name: cpu(value) for name, value in others.items()}
    torch._fused_adamw_(*([cpu(tensor) for tensor in tensors] for tensors in lists), **given)


def record_stream(tensor: Tensor, stream: Any) -> None:
    demand(tensor.is_cuda, "record_stream of a tensor on the host")


STAND_INS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": flash_attention,
    "_scaled_dot_product_flash_attention_backward": flash_attention_backward,
    "_fused_sdp_choice": choose_attention,
    "mm.dtype": product,
    "mm.dtype_out": product_out,
    "bmm.dtype": product,
    "bmm.dtype_out": product_out,
    "addmm.dtype": sum_product,
    "addmm.dtype_out": sum_product_out,
    "baddbmm.dtype": sum_product,
    "baddbmm.dtype_out": sum_product_out,
    "_fused_adamw_": fused_adamw,
    "_fused_adamw_.tensor_lr": fused_adamw,
    "record_stream": record_stream,
}


def register() -> torch.library.Library:
    """Stands for all of them as long as the library that it returns is alive."""
    library = torch.library.Library("aten", "IMPL", "CUDA")
    for name, function in STAND_INS.items():
        library.impl(name, function)
    return library

"""Sending small tensors to the device of a model together, without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes at whose multiples each tensor begins


def send(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors of the CPU on a device, in one transfer from pinned memory, which nothing waits for.

    Args:
        tensors: of any shapes and types.

    Returns:
        The tensors there: views of one buffer. On a CPU the tensors themselves.
    """
    device = torch.device(device)
    if device.type == "cpu" or not tensors:
        return list(tensors)
    buffer = join(tensors)
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    return cut(buffer.to(device, non_blocking=True), tensors)


def join(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors one after the other, [bytes] uint8."""
    buffer = torch.zeros(sum(map(_room, tensors)), dtype=torch.uint8)
    for part, tensor in zip(buffer.split([_room(tensor) for tensor in tensors]), tensors, strict=True):
        part[: tensor.nbytes] = tensor.contiguous().flatten().view(torch.uint8)
    return buffer


def cut(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `join`: views of the buffer, with the types and shapes of `tensors`."""
    parts = buffer.split([_room(tensor) for tensor in tensors])
    return [
        part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)
    ]


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

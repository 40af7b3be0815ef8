"""What a program does with the device: kernels launched, and where the host waits for the device or copies.

A copy between host and device waits unless it is non-blocking and the host's side is pinned memory. Copies on the
device and reading shapes wait for nothing.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

TO_HOST, TO_DEVICE = "copy to the host", "copy to the device"
BOOLEAN_INDEX, INDEX_OF_HOST = "boolean index", "index on the host"
# Their result, or its size, has to be known to the host. Some CUDA kernels do not wait where they are told the size.
WAITING = {
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "bool",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten._unique.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.bincount.default: "bincount",
}
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put_.default, aten.index_put.default}
MAKES_ROOM = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
ROOT = str(Path(__file__).parents[2])


class Observer(TorchDispatchMode):
    """Counts while it is active, on all threads that autograd starts for it.

    Attributes:
        waits: how often the host waited, by kind and source line.
        launches: kernels by operator, one for each call that is no view; what `torch.compile` would join counts apart.
        launched_at: the same by source line.
        bytes: copied between host and device, by direction, waiting or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()
        self.launched_at: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def wait(self, kind: str) -> None:
        self.waits[kind, source_line()] += 1

    def report(self) -> dict[str, Any]:
        waits = [{"kind": kind, "where": where, "count": count} for (kind, where), count in self.waits.most_common()]
        return {
            "waits": waits,
            "launches": dict(self.launches.most_common()),
            "launched_at": dict(self.launched_at.most_common()),
            "bytes": dict(self.bytes),
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            result = decompose(func, args, kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if on_device(args) or on_device((result,)):
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func in WAITING:
            self.wait(WAITING[func])
        elif func is aten._to_copy.default:
            self._copy(args[0], result, bool(kwargs.get("non_blocking")))
        elif func is aten.copy_.default:
            self._copy(args[1], args[0], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        elif func is aten.lift_fresh.default:  # torch.tensor(numbers, device="cuda")
            self._copy(result.cpu(), result, False)
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.wait("repeat_interleave")
        elif func in INDEXING:
            self._index(args)
        if func not in MAKES_ROOM and not is_view(func):
            self.launches[str(func).removeprefix("aten.")] += 1
            self.launched_at[source_line()] += 1

    def _copy(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.device == target.device:
            return
        kind, host = (TO_HOST, target) if source.is_cuda else (TO_DEVICE, source)
        self.bytes[kind] += host.nbytes
        if not (non_blocking and host.is_pinned()):
            self.wait(kind)

    def _index(self, args: Any) -> None:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            one_number = len(args) > 2 and args[2].numel() == 1 and len(indices) == 1
            if not one_number:  # x[mask] = number is masked_fill
                self.wait(BOOLEAN_INDEX)
        elif any(not index.is_cuda for index in indices):
            self.wait(INDEX_OF_HOST)


def decompose(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator that is made of others, which autograd does elsewhere; NotImplemented for all others."""
    return func.decompose(*args, **kwargs) if torch.is_inference_mode_enabled() else NotImplemented


def on_device(values: Sequence[Any]) -> bool:
    """Whether one of them, or of the lists among them, is a CUDA tensor."""
    return any(
        value.is_cuda if isinstance(value, Tensor) else isinstance(value, list | tuple) and on_device(value)
        for value in values
    )


def is_view(func: Any) -> bool:
    """Whether an operator only gives another view of its operand's memory."""
    return any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)


def source_line() -> str:
    """The innermost line of this project that is being run, else of transformers, else torch's own backward."""
    other, frame = None, sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and "/tests/pretend/" not in file and "/.venv" not in file:
            return f"{file.removeprefix(ROOT + '/')}:{frame.f_lineno} {frame.f_code.co_name}"
        if other is None and "/transformers/" in file:
            other = f"transformers/{file.rpartition('/transformers/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return other or "backward of torch"

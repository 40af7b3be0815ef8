"""`torch.cuda` of the pretend device, as far as this project uses it: one H100, one stream, work done at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretend.observer import WAITING, Observer, decompose, is_view

MEMORY = 80 * 2**30
PROPERTIES = SimpleNamespace(
    name="Pretend H100", total_memory=MEMORY, uuid="pretend", major=9, minor=0, multi_processor_count=132
)


class Event:
    """Work is done at once, so that everything recorded has happened."""

    observer: Observer

    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorded = False

    def record(self, stream: Any = None) -> None:
        self.recorded = True

    def wait(self, stream: Any = None) -> None:
        """Lets a stream wait, not the host."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.observer.wait("event.synchronize")

    def elapsed_time(self, end: "Event") -> float:
        if not (self.recorded and end.recorded):
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return 0.0


class Stream:
    observer: Observer
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", 0)

    def wait_stream(self, stream: Any) -> None:
        """Lets this stream wait, not the host."""

    def wait_event(self, event: Event) -> None:
        """Lets this stream wait, not the host."""

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.observer.wait("stream.synchronize")


# ------------------------------------------------------------------ graphs


class Capture(TorchDispatchMode):
    """Notes the operators of a CUDA graph; what they change is put back, because a capture computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[Any, tuple[Tensor, Tensor]] = {}  # what was written to, and what it held
        self.inference = torch.is_inference_mode_enabled()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            result = decompose(func, args, kwargs)
        if result is not NotImplemented:
            return result
        if func in WAITING or (
            func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and self._across(args, kwargs)
        ):
            raise RuntimeError(f"operation not permitted when stream is capturing ({func})")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
                        self.before.setdefault(place, (tensor, tensor.clone()))
        result = func(*args, **kwargs)
        if not is_view(func):  # a view is of memory that stays where it is
            self.calls.append((func, args, kwargs, result))
        return result

    @staticmethod
    def _across(args: Any, kwargs: Any) -> bool:
        """A copy between the host's pageable memory and the device."""
        kinds = {tensor.device.type for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        if kwargs.get("device") is not None:
            kinds.add(torch.device(kwargs["device"]).type)
        pinned = any(isinstance(one, Tensor) and not one.is_cuda and one.is_pinned() for one in tree_leaves(args))
        return len(kinds) > 1 and not pinned

    def restore(self) -> None:
        for tensor, held in reversed(self.before.values()):
            tensor.copy_(held)


class CUDAGraph:
    """Replays the operators of a capture into the same memory."""

    observer: Observer

    def __init__(self, *_: Any, **__: Any) -> None:
        self.capture: Capture | None = None

    def replay(self) -> None:
        if self.capture is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self.observer.launches["graph replay"] += 1
        with _paused(self.observer), torch.inference_mode(self.capture.inference), torch.no_grad():
            for func, args, kwargs, result in self.capture.calls:
                again = func(*args, **kwargs)
                for new, old in zip(tree_leaves(again), tree_leaves(result), strict=True):
                    if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def reset(self) -> None:
        self.capture = None


_capturing: list[CUDAGraph] = []


@contextmanager
def capture(graph: CUDAGraph, *_: Any, **__: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    noted = Capture()
    _capturing.append(graph)
    try:
        with noted:
            yield
    finally:
        _capturing.pop()
    with torch.no_grad():
        noted.restore()
    graph.capture = noted


@contextmanager
def _paused(observer: Observer) -> Iterator[None]:
    """What a graph launches is one launch of the host."""
    kept = (observer.waits.copy(), observer.launches.copy(), observer.launched_at.copy(), observer.bytes.copy())
    try:
        yield
    finally:
        observer.waits, observer.launches, observer.launched_at, observer.bytes = kept


# ------------------------------------------------------------------ all of it


@contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def unchanged(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """`torch.compile`: a compiled function gives what the function gives."""
    return function if function is not None else lambda given: given


def clone_storage(storage: Any) -> Any:
    """What copying a tensor with `copy.deepcopy` needs: torch makes storages of the devices it was built for."""
    if storage.device.type != "cuda":
        return type(storage)(storage.nbytes(), device=storage.device).copy_(storage)
    size = storage.nbytes()
    return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage, 0, (size,), (1,)).clone().untyped_storage()


def install(observer: Observer) -> None:
    """Replace `torch.cuda` for the rest of this process."""
    Event.observer = Stream.observer = CUDAGraph.observer = observer
    stream, rng = Stream(), torch.zeros(16, dtype=torch.uint8)
    replaced: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: PROPERTIES,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: observer.wait("torch.cuda.synchronize"),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": rng.clone(),
        "get_rng_state_all": lambda: [rng.clone()],
        "set_rng_state": lambda state, device="cuda": None,
        "set_rng_state_all": lambda states: None,
        "Stream": Stream,
        "Event": Event,
        "stream": _nothing,
        "device": _nothing,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "CUDAGraph": CUDAGraph,
        "graph": capture,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: bool(_capturing),
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.UntypedStorage.clone = clone_storage
    torch.compile = unchanged

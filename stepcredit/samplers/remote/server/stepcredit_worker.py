"""What a vLLM server runs for stepcredit; it needs nothing but vLLM.

    PYTHONPATH=FOLDER OF THIS FILE VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server \\
        --worker-extension-cls stepcredit_worker.Extension ...
"""

import json
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import wraps
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"
ALIGNED = 16  # bytes, so that a piece of a chunk can be read as any type

Entry = tuple[str, str, list[int]]  # name, type and shape of a tensor


def answering(method: Callable[..., Any]) -> Callable[..., Any]:
    """Say what went wrong instead of raising where the workers of an engine are several.

    vLLM would leave the answers of the others lying, and take them for those to the next calls. A worker alone may
    raise, and should: of several engines vLLM passes on the answers of the first one, but the errors of all.
    """

    @wraps(method)
    def run(self: "Extension", *args: str) -> Any:
        try:
            return method(self, *args)
        except Exception as error:
            if self.parallel_config.world_size == 1:
                raise
            return {"error": f"{type(error).__name__}: {error}"}

    return run


class Extension:
    """Methods of every worker of the server, called by `/collective_rpc`, whose arguments are texts.

    Attributes:
        stepcredit_taken: version of the weights that it has; empty where they are the server's own or half of others.
        stepcredit_version: the same, once all workers have them and the caches are empty.
        stepcredit_key: of the meeting place that it came to last.
    """

    model_runner: Any
    parallel_config: Any
    model_config: Any
    device: torch.device
    stepcredit_taken = stepcredit_version = stepcredit_key = ""
    stepcredit_store: Any = None
    stepcredit_group: Any = None
    stepcredit_rank = 0

    @answering
    def stepcredit_load(self, folder: str, version: str) -> str:
        """Take over the weights in a folder."""
        return self._stepcredit_take(version, weights_path=folder)

    @answering
    def stepcredit_commit(self, version: str) -> str:
        """From now on this is the version that the server says it has."""
        if self.stepcredit_taken != version:
            raise RuntimeError(f"this worker has weights '{self.stepcredit_taken}', not '{version}'")
        self.stepcredit_version = version
        return version

    def stepcredit_loaded(self) -> str:
        """The version that was committed last; empty at the server's start, and since loading began."""
        return self.stepcredit_version

    @answering
    def stepcredit_place(self, folder: str) -> dict[str, Any]:
        """Where this worker is: the GPU that it has, or none; whether it can read a folder, and would be heard if not;
        and the type of its weights.

        Of several engines of several workers each nobody hears that the workers of the second one have failed.
        """
        on_gpu, config = self.device.type == "cuda", self.parallel_config
        gpu = str(torch.cuda.get_device_properties(self.device).uuid) if on_gpu else ""
        heard = config.world_size == 1 or config.data_parallel_size == 1
        sees, dtype = os.access(folder, os.R_OK | os.X_OK), str(self.model_config.dtype).removeprefix("torch.")
        return {"gpu": gpu, "sees": sees, "heard": heard, "dtype": dtype}

    @answering
    def stepcredit_arrive(self, key: str, host: str, port: str, timeout_s: str) -> int:
        """Come to a meeting place of the trainer's, which counts how many workers a server has."""
        store = dist.TCPStore(host, int(port), timeout=timedelta(seconds=float(timeout_s)))
        self.stepcredit_store, self.stepcredit_group, self.stepcredit_key = store, None, key
        self.stepcredit_rank = int(store.add("arrived", 1))
        return self.stepcredit_rank

    @answering
    def stepcredit_join(self, key: str, backend: str, size: str, timeout_s: str) -> None:
        """Make a group with those that have come; the trainer is its number 0."""
        self._stepcredit_still(key)
        store = self.stepcredit_store
        address = own_address(store.host, store.port)
        self.stepcredit_group = open_group(backend, store, self.stepcredit_rank, int(size), float(timeout_s), address)
        word = torch.zeros(1, dtype=torch.long, device=self.device if backend == "nccl" else "cpu")
        self.stepcredit_group.broadcast(word, 0).wait()
        if int(word) != int(size):
            raise RuntimeError(f"{backend} brought {int(word)} where {size} was sent")

    @answering
    def stepcredit_receive(self, key: str, limit: str, entries: str, version: str) -> str:
        """Take over the weights that the trainer broadcasts in this order, in chunks of this size."""
        self._stepcredit_still(key)
        where = self.device if self.stepcredit_group.name() == "nccl" else torch.device("cpu")

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for chunk in chunks(json.loads(entries), int(limit)):
                flat = torch.empty(sum(map(room, chunk)), dtype=torch.uint8, device=where)
                self.stepcredit_group.broadcast(flat, 0).wait()
                yield from pieces(flat, chunk)

        try:
            self._stepcredit_take(version, weights_iterator=tensors())
        except BaseException:
            self.stepcredit_group = None  # which ends it for the trainer, who is still sending
            raise
        self.stepcredit_store.add(version, 1)
        return version

    def _stepcredit_still(self, key: str) -> None:
        if self.stepcredit_key != key:
            raise RuntimeError("another trainer gives this server weights")

    def _stepcredit_take(self, version: str, **weights: Any) -> str:
        self.stepcredit_taken = self.stepcredit_version = ""
        self.model_runner.reload_weights(**weights)
        for module in self.model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead":  # else a tied one stays what it was, on a CPU
                module.quant_method.process_weights_after_loading(module)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stepcredit_taken = version
        return version


# What follows is used by both ends.


def own_address(host: str, port: int) -> str:
    """The address under which `host` sees this machine."""
    kind, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as one:
        one.connect(where)  # sends nothing
        return str(one.getsockname()[0])


def open_group(backend: str, store: Any, rank: int, size: int, timeout_s: float, address: str) -> Any:
    """Processes that broadcast to each other, beside any other groups that they are in."""
    store, limit = dist.PrefixStore(backend, store), timedelta(seconds=timeout_s)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        before = os.environ.get(BLOCKING)
        os.environ[BLOCKING] = "1"  # read once, here: waiting fails after the timeout, and no watchdog ends the process
        try:
            return dist.ProcessGroupNCCL(store, rank, size, options)
        finally:
            os.environ.pop(BLOCKING) if before is None else os.environ.update({BLOCKING: before})
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = limit
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._threads = 2
    return dist.ProcessGroupGloo(store, rank, size, options)


def room(entry: Entry) -> int:
    """Bytes that a tensor takes in a chunk."""
    _, dtype, shape = entry
    return -(-prod(shape) * getattr(torch, dtype).itemsize // ALIGNED) * ALIGNED


def chunks(entries: list[Entry], limit: int) -> Iterator[list[Entry]]:
    """Tensors that are sent together, at most `limit` bytes; a larger one goes alone."""
    held: list[Entry] = []
    taken = 0
    for entry in entries:
        if held and taken + room(entry) > limit:
            yield held
            held, taken = [], 0
        held.append(entry)
        taken += room(entry)
    if held:
        yield held


def pieces(flat: Tensor, chunk: list[Entry]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a chunk, as views of its bytes."""
    at = 0
    for entry in chunk:
        name, dtype, shape = entry
        kind = getattr(torch, dtype)
        yield name, flat[at : at + prod(shape) * kind.itemsize].view(kind).view(shape)
        at += room(entry)

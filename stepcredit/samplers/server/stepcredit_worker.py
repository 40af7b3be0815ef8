"""What a vLLM server runs for stepcredit; it needs nothing but vLLM.

    PYTHONPATH=FOLDER OF THIS FILE VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server \\
        --worker-extension-cls stepcredit_worker.Extension ...
"""

import json
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = {"gloo": 1 << 24, "nccl": 1 << 28}  # bytes that are sent at once
ALIGNED = 16  # bytes, so that a piece of a chunk can be read as any type

Entry = tuple[str, str, list[int]]  # name, type and shape of a tensor


class Extension:
    """Methods of every worker of the server, called by `/collective_rpc`, whose arguments are texts."""

    model_runner: Any
    device: torch.device
    stepcredit_version = ""
    stepcredit_store: Any = None
    stepcredit_group: Any = None
    stepcredit_rank = 0

    def stepcredit_load(self, folder: str, version: str) -> str:
        """Take over the weights in a folder; `version` is what the server says afterwards."""
        return self._stepcredit_take(version, weights_path=folder)

    def stepcredit_loaded(self) -> str:
        """The version that was loaded last; empty at the server's start, and when loading failed."""
        return self.stepcredit_version

    def stepcredit_place(self, folder: str) -> dict[str, Any]:
        """Where this worker is: the GPU that it has, or none, and whether it sees a folder."""
        on_gpu = self.device.type == "cuda"
        gpu = str(torch.cuda.get_device_properties(self.device).uuid) if on_gpu else ""
        return {"gpu": gpu, "sees": os.path.isdir(folder)}

    def stepcredit_arrive(self, host: str, port: str, timeout_s: str) -> int:
        """Come to a meeting place of the trainer's, which counts how many workers a server has."""
        self.stepcredit_store = dist.TCPStore(host, int(port), timeout=timedelta(seconds=float(timeout_s)))
        self.stepcredit_rank = int(self.stepcredit_store.add("arrived", 1))
        return self.stepcredit_rank

    def stepcredit_join(self, backend: str, size: str, timeout_s: str) -> None:
        """Make a group with those that have come; the trainer is its number 0."""
        store = self.stepcredit_store
        address = own_address(store.host, store.port)
        self.stepcredit_group = open_group(backend, store, self.stepcredit_rank, int(size), float(timeout_s), address)
        word = torch.zeros(1, dtype=torch.long, device=self.device if backend == "nccl" else "cpu")
        self.stepcredit_group.broadcast(word, 0).wait()
        if int(word) != int(size):
            raise RuntimeError(f"{backend} brought {int(word)} where {size} was sent")

    def stepcredit_receive(self, entries: str, version: str) -> str:
        """Take over the weights that the trainer broadcasts in this order."""
        if self.stepcredit_group is None:
            raise RuntimeError("this worker is in no group with the trainer")
        backend = self.stepcredit_group.name()
        where = self.device if backend == "nccl" else torch.device("cpu")

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for chunk in chunks(json.loads(entries), CHUNK[backend]):
                flat = torch.empty(sum(map(room, chunk)), dtype=torch.uint8, device=where)
                self.stepcredit_group.broadcast(flat, 0).wait()
                yield from pieces(flat, chunk)

        try:
            return self._stepcredit_take(version, weights_iterator=tensors())
        except BaseException:
            self.stepcredit_group = None  # which ends it for the trainer, who is still sending
            raise

    def _stepcredit_take(self, version: str, **weights: Any) -> str:
        self.stepcredit_version = ""
        self.model_runner.reload_weights(**weights)
        for module in self.model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead":  # else a tied one stays what it was, on a CPU
                module.quant_method.process_weights_after_loading(module)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stepcredit_version = version
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
        return dist.ProcessGroupNCCL(store, rank, size, options)
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

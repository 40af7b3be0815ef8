"""Weights from the trainer's memory to a server's workers, by broadcast in a group of their own.

Servers have groups of their own too, so that one that ends takes no other with it. Workers first come to a meeting
place (a TCPStore), which says how many there are whatever the server's parallelism, then trainer and workers make a
group, then every update is broadcast in chunks. Both ends run `server/stepcredit_worker.py`.

Whatever may block runs in a thread that nobody waits for longer than he has to: a group with a part that hangs blocks
in its operations, and again when it is deleted.
"""

import json
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.samplers.remote.server.stepcredit_worker import Entry, chunks, open_group, own_address, pieces, room

TIMEOUT_S = 60.0  # for a chunk, or for the others to come
CHUNK = {"gloo": 1 << 24, "nccl": 1 << 28}  # bytes that are sent at once

WorkerMethod = Callable[..., Any]  # (method of the workers, its arguments as texts)


class TransferError(Exception):
    """The group is of no use any more."""


class Transfer:
    """A group with the workers of one server.

    Args:
        url: of the server.
        backend: "nccl" or "gloo".
        device: that the tensors are sent from; a GPU for nccl.
        call: has all workers of the server run a method, and waits for it.

    Raises:
        TransferError: the group does not come about.
    """

    def __init__(self, url: str, backend: str, device: torch.device, call: WorkerMethod) -> None:
        self.backend, self.call, self.key = backend, call, uuid.uuid4().hex
        self.device = device if backend == "nccl" else torch.device("cpu")
        self.group: Any = None
        if backend == "nccl" and not dist.is_nccl_available():
            raise TransferError("nccl, which this torch does not have")
        there, limit = urlsplit(url), timedelta(seconds=TIMEOUT_S)
        address = own_address(there.hostname or "127.0.0.1", there.port or 80)
        try:
            self.store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=limit)
            self.call("stepcredit_arrive", self.key, address, str(self.store.port), str(TIMEOUT_S))
        except (UserError, RuntimeError) as error:
            raise TransferError(f"{backend}: {_first_line(error)}") from error
        self.size = 1 + int(self.store.add("arrived", 0))

        def meet(answer: "Future[Any]") -> None:
            self.group = _beside(answer, lambda: open_group(backend, self.store, 0, self.size, TIMEOUT_S, address))
            self._send(torch.tensor([self.size], device=self.device), answer)

        self._together(meet, "stepcredit_join", self.key, backend, str(self.size), str(TIMEOUT_S))

    def send(self, tensors: Mapping[str, Tensor], version: str, types: Mapping[str, torch.dtype] | None = None) -> None:
        """Give the workers these weights.

        Args:
            types: that they are sent in, where these are others; they are cast on the device that they are on.

        Raises:
            TransferError: they have not got them all.
        """
        sent = {name: (types or {}).get(name, tensor.dtype) for name, tensor in tensors.items()}
        entries: list[Entry] = [
            (name, str(sent[name]).removeprefix("torch."), list(tensor.shape)) for name, tensor in tensors.items()
        ]
        limit = CHUNK[self.backend]

        def broadcast(answer: "Future[Any]") -> None:
            for chunk in chunks(entries, limit):
                flat = torch.empty(sum(map(room, chunk)), dtype=torch.uint8, device=self.device)
                for name, piece in pieces(flat, chunk):
                    piece.copy_(tensors[name].detach().to(sent[name]))
                self._send(flat, answer)

        self._together(broadcast, "stepcredit_receive", self.key, str(limit), json.dumps(entries), version)
        taken = int(self.store.add(version, 0))
        if taken != self.size - 1:
            self.close()
            raise TransferError(f"{self.backend}: {taken} of {self.size - 1} workers have taken the weights")

    def close(self) -> None:
        """Leave the group, in a thread, because that waits for those of its operations that have not ended."""
        if self.group is not None:
            held, self.group = [self.group], None
            threading.Thread(target=_leave, args=(held, self.backend)).start()

    def _together(self, work: Callable[["Future[Any]"], None], method: str, *args: str) -> None:
        """Do our part while the workers do theirs."""
        answer = _started(lambda: self.call(method, *args), daemon=True)
        failure: str | None = None
        try:
            work(answer)
        except RuntimeError as error:
            failure = _first_line(error)
        except BaseException:
            self.close()
            raise
        if failure is not None:
            self.close()  # now that nothing else holds it, so that the workers' part ends too
            wait([answer], TIMEOUT_S)
        if failure is None or answer.done():
            try:
                answer.result()
            except (UserError, RuntimeError) as error:  # their end says more
                self.close()
                failure = _first_line(error)
        if failure is not None:
            raise TransferError(f"{self.backend}: {failure}")

    def _send(self, tensor: Tensor, answer: "Future[Any]") -> None:
        group = [self.group]  # its last holder is not to be a thread that is left behind
        _beside(answer, lambda: group.pop().broadcast(tensor, 0).wait())


def _started(function: Callable[[], Any], daemon: bool = False) -> "Future[Any]":
    """A call in a thread of its own.

    Args:
        daemon: it may end with the program; not for what torch does, which would end it by SIGABRT.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=daemon).start()
    return future


def _beside(answer: "Future[Any]", function: Callable[[], Any]) -> Any:
    """What a call gives, unless the workers have failed meanwhile or it takes too long.

    Raises:
        RuntimeError: in these cases.
    """
    own = _started(function)
    waiting = {own, answer}
    while not own.done():
        done, waiting = wait(waiting, TIMEOUT_S, FIRST_COMPLETED)
        if not done:
            raise RuntimeError(f"nothing has got through for {TIMEOUT_S:g} s")
        if answer.done() and answer.exception() and not own.done():
            raise RuntimeError("the workers have given up")
    return own.result()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _leave(held: list[Any], backend: str) -> None:
    with suppress(RuntimeError):  # it may have failed
        if backend == "nccl":
            held[0].abort()  # a shutdown would wait for what is stuck
    held.clear()

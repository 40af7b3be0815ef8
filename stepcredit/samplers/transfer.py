"""Weights from the trainer's memory to a server's workers, by broadcast in a group of their own.

Servers have groups of their own too, so that one that ends takes no other with it. Workers first come to a meeting
place (a TCPStore), which says how many there are whatever the server's parallelism, then trainer and workers make a
group, then every update is broadcast in chunks. Both ends run `server/stepcredit_worker.py`.
"""

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.samplers.server.stepcredit_worker import CHUNK, Entry, chunks, open_group, own_address, pieces, room

TIMEOUT_S = 60.0  # for a chunk, or for the others to come
PAUSE_S = 0.0005

Call = Callable[..., Any]  # (method of the workers, its arguments as texts)


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

    def __init__(self, url: str, backend: str, device: torch.device, call: Call) -> None:
        self.backend, self.call = backend, call
        self.group: Any = None
        self.device = device if backend == "nccl" else torch.device("cpu")
        if backend == "nccl" and not dist.is_nccl_available():
            raise TransferError("nccl, which this torch does not have")
        there = urlsplit(url)
        address = own_address(there.hostname or "127.0.0.1", there.port or 80)
        limit = timedelta(seconds=TIMEOUT_S)
        self.store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=limit)
        try:
            self.call("stepcredit_arrive", address, str(self.store.port), str(TIMEOUT_S))
        except UserError as error:
            raise TransferError(f"{backend}: {error}") from error
        self.size = 1 + int(self.store.add("arrived", 0))

        def meet() -> None:
            self.group = open_group(backend, self.store, 0, self.size, TIMEOUT_S, address)
            self._send(torch.tensor([self.size], device=self.device))

        self._together(meet, "stepcredit_join", backend, str(self.size), str(TIMEOUT_S))

    def send(self, tensors: Mapping[str, Tensor], version: str) -> None:
        """Give the workers these weights.

        Raises:
            TransferError: they have not got them all.
        """
        entries: list[Entry] = [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in tensors.items()
        ]

        def broadcast() -> None:
            for chunk in chunks(entries, CHUNK[self.backend]):
                flat = torch.empty(sum(map(room, chunk)), dtype=torch.uint8, device=self.device)
                for name, piece in pieces(flat, chunk):
                    piece.copy_(tensors[name])
                self._send(flat)

        self._together(broadcast, "stepcredit_receive", json.dumps(entries), version)

    def close(self) -> None:
        if self.group is not None:
            with suppress(RuntimeError):  # it may have failed
                self.group.shutdown()

    def _together(self, work: Callable[[], None], method: str, *args: str) -> None:
        """Do our part while the workers do theirs."""
        with ThreadPoolExecutor(1) as pool:
            self._answer: Future[Any] = pool.submit(self.call, method, *args)
            try:
                work()
            except RuntimeError as error:
                self.close()
                why = str(self._answer.exception() or error).strip()  # the workers' end says more
                raise TransferError(f"{self.backend}: {why.splitlines()[0]}") from error
            self._answer.result()

    def _send(self, tensor: Tensor) -> None:
        work, until = self.group.broadcast(tensor, 0), time.monotonic() + TIMEOUT_S
        while not work.is_completed():
            if self._answer.done() and self._answer.exception():
                raise RuntimeError("the workers have given up")
            if time.monotonic() > until:
                raise RuntimeError(f"a chunk has not got through within {TIMEOUT_S:g} s")
            time.sleep(PAUSE_S)
        work.wait()

"""The processes of a run and what they say to each other, over gloo, so that it works beside any device."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stepcredit.errors import UserError
from stepcredit.processes.watch import Watch

T = TypeVar("T")

TIMEOUT_S = 1800.0


class Elsewhere(UserError):
    """An error that the first process has met, and says."""

    said = True


class Ranks:
    """The processes of a run.

    Attributes:
        rank, size: of this process, and how many there are.
        local_rank, local_size: the same on this machine.
        main: this is the first process, which writes and shows.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.main = rank == 0
        self.timeout_s = TIMEOUT_S
        self._host: Any = None
        self._watch: Watch | None = None

    @classmethod
    def join(cls, timeout_s: float = TIMEOUT_S, device: str = "auto") -> "Ranks":
        """Meet the other processes that torchrun has started; alone where it has not.

        Args:
            timeout_s: seconds after which a process that does not answer ends the run.
            device: "cuda" or "auto" take a GPU for each process, where there are any.

        Raises:
            UserError: the device is one GPU for all processes, or there are fewer GPUs than processes.
        """
        if "RANK" not in os.environ:
            return ALONE
        number = {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        found = cls(number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"], number["LOCAL_WORLD_SIZE"])
        on_gpu = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
        if on_gpu:
            if found.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"torchrun: {found.local_size} processes on a machine with {torch.cuda.device_count()} GPUs; take "
                    f"--nproc-per-node {torch.cuda.device_count()}, or --device cpu"
                )
            torch.cuda.set_device(found.local_rank)
        limit = timedelta(seconds=timeout_s)
        found.timeout_s = timeout_s
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("run", store), rank=rank, world_size=size, timeout=limit
        )
        found._host = dist.new_group(backend="gloo", timeout=limit)
        found._watch = Watch(dist.PrefixStore("watch", store), rank, size, timeout_s)
        found.wait()
        found.first(lambda: found.check_device(device))
        return found

    def check_device(self, device: str) -> None:
        """Each process has a GPU of its own, numbered by torchrun; a number in the config would be that of all."""
        kind, _, number = device.partition(":")
        if kind != "cuda" or not number or (self.local_size == 1 and number == "0"):
            return
        raise UserError(
            f"train.device: {device} names one GPU, and torchrun gives each of its {self.size} processes its own; take "
            "--device cuda, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )

    def leave(self) -> None:
        """The end of a run that went well."""
        if self._host is not None and dist.is_initialized():
            dist.destroy_process_group()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self

    @property
    def grouped(self) -> bool:
        """Whether torchrun has started this process, be it the only one."""
        return self._host is not None

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a sequence that all have: every `size`-th."""
        return list(items[self.rank :: self.size])

    def wait(self) -> None:
        """Wait for all.

        Raises:
            UserError: one does not answer in time, with its number, or has gone.
        """
        if self._watch is not None and self.size > 1:
            self._watch.pass_by()
            with self.named():
                dist.monitored_barrier(self._host, timedelta(seconds=self.timeout_s), wait_all_ranks=True)

    @contextmanager
    def named(self) -> Iterator[None]:
        """A collective that fails inside the block, because another process is missing, says which.

        Raises:
            UserError: in its place.
        """
        try:
            yield
        except RuntimeError as error:
            if self._watch is None or not is_lost(error):
                raise
            missing = self._watch.missing()
            which = f"process {' and '.join(map(str, missing))}" if missing else "another process"
            raise UserError(
                f"{which} has ended or has not answered for {self.timeout_s:g} s (distributed.timeout_s); if it said "
                "why, that is above or in its log. Continue from the last checkpoint with --resume auto"
            ) from error

    def gather(self, value: T) -> list[T]:
        """What every process has, by rank."""
        if self.size == 1:
            return [value]
        self.wait()
        found: list[Any] = [None] * self.size
        with self.named():
            dist.all_gather_object(found, value, self._host)
        return found

    def any(self, flag: bool) -> bool:
        """Whether it holds for one process at least."""
        return any(self.gather(flag))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of a tensor on the CPU."""
        if self.size == 1:
            return values
        self.wait()
        total = values.clone()
        with self.named():
            dist.all_reduce(total, group=self._host)
        return total

    def first(self, function: Callable[[], T]) -> T:
        """What the first process's call gives; only that one makes it.

        Raises:
            Elsewhere: on the others, where it raised.
        """
        if self.size == 1:
            return function()
        value, failure = None, None
        if self.main:
            try:
                value = function()
            except Exception as error:
                failure = error
        value, said = self.gather((value, None if failure is None else str(failure)))[0]
        if failure is not None:
            raise failure
        if said is not None:
            raise Elsewhere(said)
        return value  # type: ignore[return-value]


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Deal items to so many hands, the largest first and each to the hand that has least.

    Returns:
        Item numbers of each hand, ascending; a hand may stay empty.

    >>> deal([5, 1, 4, 3], 2)
    [[0, 1], [2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(hands)]
    load = [0] * hands
    for item in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        hand = load.index(min(load))
        found[hand].append(item)
        load[hand] += sizes[item]
    return [sorted(items) for items in found]


def is_lost(error: Exception) -> bool:
    """Whether an error is a collective's that waits for a process in vain."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        sign in words for sign in ("gloo", "nccl", "connection closed", "connection reset", "timed out", "barrier")
    )


ALONE = Ranks()

"""The processes of a run and their communication, over gloo, so that it works beside any device."""

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


class OtherProcessError(UserError):
    """An error raised in the main process, which reports it."""

    already_reported = True


class Ranks:
    """The processes of a run.

    Attributes:
        rank, size: of this process, and how many there are.
        local_rank, local_size: the same on this machine.
        main: this is the main process (rank 0), which writes and prints.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.main = rank == 0
        self.timeout_s = TIMEOUT_S
        self._host: Any = None
        self._watch: Watch | None = None

    @classmethod
    def join(cls, timeout_s: float = TIMEOUT_S, device: str = "auto") -> "Ranks":
        """Connect to the other processes that torchrun has started; a single process without torchrun.

        Args:
            timeout_s: seconds after which a process that does not answer ends the run.
            device: "cuda" or "auto" take a GPU for each process, where there are any.

        Raises:
            UserError: the device is one GPU for all processes, or there are fewer GPUs than processes.
        """
        if "RANK" not in os.environ:
            return SINGLE_PROCESS
        number = {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
        ranks = cls(number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"], number["LOCAL_WORLD_SIZE"])
        on_gpu = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
        if on_gpu:
            if ranks.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"torchrun: {ranks.local_size} processes on a machine with {torch.cuda.device_count()} GPUs; take "
                    f"--nproc-per-node {torch.cuda.device_count()}, or --device cpu"
                )
            torch.cuda.set_device(ranks.local_rank)
        limit = timedelta(seconds=timeout_s)
        ranks.timeout_s = timeout_s
        store, rank, size = next(dist.rendezvous("env://", timeout=limit))
        store.set_timeout(limit)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("run", store), rank=rank, world_size=size, timeout=limit
        )
        ranks._host = dist.new_group(backend="gloo", timeout=limit)
        ranks._watch = Watch(dist.PrefixStore("watch", store), rank, size, timeout_s)
        ranks.barrier()
        ranks.on_main(lambda: ranks.check_device(device))
        return ranks

    @classmethod
    def of_group(cls) -> "Ranks":
        """Those of torch's default group, which another library has made and ends; a single process without one.

        All of its processes call this. One that is missing is not named: the group's own error is raised.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return SINGLE_PROCESS
        local_rank, local_size = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE", "1")
        ranks = cls(dist.get_rank(), dist.get_world_size(), int(local_rank), int(local_size))
        ranks._host = dist.new_group(backend="gloo")
        return ranks

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
    def distributed(self) -> bool:
        """Whether torchrun has started this process, even if it is the only one."""
        return self._host is not None

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a sequence that all have: every `size`-th item."""
        return list(items[self.rank :: self.size])

    def barrier(self) -> None:
        """Wait for all processes.

        Raises:
            UserError: one does not answer in time, with its number, or has ended.
        """
        if self._watch is not None and self.size > 1:
            self._watch.arrive()
            with self.name_missing():
                dist.monitored_barrier(self._host, timedelta(seconds=self.timeout_s), wait_all_ranks=True)

    @contextmanager
    def name_missing(self) -> Iterator[None]:
        """When a collective inside the block fails because another process is missing, say which.

        Raises:
            UserError: in place of the collective's error.
        """
        try:
            yield
        except RuntimeError as error:
            if self._watch is None or not means_missing_process(error):
                raise
            missing = self._watch.missing()
            which = f"process {' and '.join(map(str, missing))}" if missing else "another process"
            raise UserError(
                f"{which} has ended or has not answered for {self.timeout_s:g} s (distributed.timeout_s); if it said "
                "why, that is above or in its log. Continue from the last checkpoint with --resume auto"
            ) from error

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        self.barrier()
        values: list[Any] = [None] * self.size
        with self.name_missing():
            dist.all_gather_object(values, value, self._host)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in at least one process."""
        return any(self.gather(flag))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of a tensor on the CPU."""
        if self.size == 1:
            return values
        self.barrier()
        total = values.clone()
        with self.name_missing():
            dist.all_reduce(total, group=self._host)
        return total

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function in the main process alone; its result in every process.

        Raises:
            OtherProcessError: in the other processes, where the function raised.
        """
        if self.size == 1:
            return function()
        value, failure = None, None
        if self.main:
            try:
                value = function()
            except Exception as error:
                failure = error
        value, message = self.gather((value, None if failure is None else str(failure)))[0]
        if failure is not None:
            raise failure
        if message is not None:
            raise OtherProcessError(message)
        return value  # type: ignore[return-value]


def balanced_shares(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Distribute items over shares of similar total size: the largest item first, each to the smallest share.

    Returns:
        Item numbers of each share, ascending; a share may be empty.

    >>> balanced_shares([5, 1, 4, 3], 2)
    [[0, 1], [2, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0] * num_shares
    for item in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        smallest = totals.index(min(totals))
        shares[smallest].append(item)
        totals[smallest] += sizes[item]
    return [sorted(items) for items in shares]


def means_missing_process(error: Exception) -> bool:
    """Whether an error is that of a collective which another process has not joined."""
    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        sign in words for sign in ("gloo", "nccl", "connection closed", "connection reset", "timed out", "barrier")
    )


SINGLE_PROCESS = Ranks()

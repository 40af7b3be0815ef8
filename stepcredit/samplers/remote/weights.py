"""The policy's weights on their way to servers: their versions, and the ways there.

A server gets them through a folder that it loads, by broadcast from the trainer's memory (`transfer.py`), or, of a
policy with adapters, as adapters in a folder, which are models of their own.
"""

import fcntl
import logging
import shutil
import tempfile
import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stepcredit.errors import UserError
from stepcredit.learn.adapters import has_adapters
from stepcredit.learn.placement import full_state
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import checkpoint_tensors, save_policy
from stepcredit.policy.precision import stays_in_fp32
from stepcredit.processes.ranks import Ranks
from stepcredit.samplers.remote.connection import Retry, Server
from stepcredit.samplers.remote.dialect import Dialect, Place
from stepcredit.samplers.remote.transfer import Transfer, TransferError

log = logging.getLogger("stepcredit")

Way = Literal["auto", "folder", "nccl", "gloo"]

MEMORY = Path("/dev/shm")
LOCKS: list[IO[bytes]] = []  # held open


class Weights:
    """What servers are given, by version.

    Args:
        way: "folder", "nccl" (from GPU to GPU), "gloo" (between any devices, over the network) or "auto": nccl where
            trainer and server have GPUs of their own, else the folder if the server sees it, else gloo.
        device: on which the policy will compute.
        ranks: the processes of the run; the first sends the weights.

    They are sent in the type that the server holds them in, cast on the device that they are on.

    Attributes:
        number: of the update that they are of.
        token: of the run; a server may know other runs.
        adapted: the policy has adapters, which alone are given.
        folder: of the run's own, once `open_folder` was called.
    """

    folder: Path

    def __init__(self, dialect: Dialect, policy: Policy, ranks: Ranks, way: Way, device: torch.device) -> None:
        self.dialect, self.policy, self.ranks, self.way, self.device = dialect, policy, ranks, way, device
        self.token, self.number = ranks.on_main(lambda: uuid.uuid4().hex[:8]), 0
        self.adapted = has_adapters(policy)
        self.state: dict[str, Tensor] = {}  # of the first process
        self.copied = False  # `state` takes memory of its own
        self.buffers = {name for name, _ in policy.model.named_buffers()}
        self._writing = threading.Lock()
        self._remove: Callable[[], object] | None = None
        if way == "nccl" and device.type != "cuda":
            raise UserError(
                "sampler.server.transfer: nccl goes from GPU to GPU, and the policy is on the CPU; take gloo"
            )
        if self.adapted and way not in ("auto", "folder"):
            raise UserError(f"sampler.server.transfer: adapters go through a folder, not by {way}")

    def open_folder(self, parent: Path | None) -> None:
        """Make the folder below a parent; None: in memory where there is a /dev/shm."""
        self.folder = self.ranks.on_main(lambda: new_folder(parent))
        if self.ranks.main:
            self._remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder."""
        if self._remove is not None:
            self._remove()

    @property
    def version(self) -> str:
        """Of the weights that all servers should have."""
        return f"stepcredit-{self.token}-{self.number}"

    # ------------------------------------------------------------------ an update

    def update(self, policy: Policy, servers: Sequence[Server]) -> None:
        """Give all servers the policy's weights; those that do not answer are down, and get them when they are back.

        All processes call this.

        Raises:
            UserError: a server does not take them.
        """
        self.state = self._gathered(policy, servers)
        self.number += 1
        ways = self.ranks.on_main(lambda: self._send(servers))
        for server, way in zip(servers, ways, strict=True):
            server.way = way
            if not server.down:  # else it is woken when it is back
                server.asleep = set()
        in_folder = all(server.way == "folder" for server in servers)
        written = all(self._version_folder(server.dtype or "").exists() for server in servers)
        if in_folder and written and self.copied:
            self.state = {}  # the folder holds them

    def _gathered(self, policy: Policy, servers: Sequence[Server]) -> dict[str, Tensor]:
        """The state, in the first process: the policy's own tensors, or, of shards, copies on the host.

        The policy does not change while servers are asked for samples, so that its own tensors stay those of `version`.
        """
        self.copied = not self.adapted and any(isinstance(value, DTensor) for value in policy.parameters())
        if not self.copied:
            return full_state(policy, collect=self.ranks.main, on_host=False)
        dtypes = self.ranks.on_main(lambda: {server.dtype or "" for server in servers})
        only = next(iter(dtypes)) if len(dtypes) == 1 else ""
        return full_state(policy, self.ranks.main, types=partial(self._sent_as, only))

    def _sent_as(self, wanted: str, name: str, value: Tensor) -> torch.dtype:
        """The type in which a tensor goes to a server that holds weights in another: buffers stay what they are."""
        casts = wanted and value.dtype == torch.float32 and name not in self.buffers
        return getattr(torch, wanted) if casts and not stays_in_fp32(self.policy.model, name) else value.dtype

    def _send(self, servers: Sequence[Server]) -> list[str]:
        """Load all servers, as the first process; the way that each gets weights."""
        why = ""
        for old in self.folder.iterdir():
            shutil.rmtree(old, ignore_errors=True)
        for server in servers:
            try:
                self.load(server)
            except Retry as error:
                server.down, why = True, str(error)
                log.warning("%s: %s; it gets the weights when it is back", self.dialect.name, error)
        if self.number == 1 and all(server.down for server in servers):
            raise UserError(f"sampler.server.urls: {why}")
        return [server.way for server in servers]

    # ------------------------------------------------------------------ a server

    def model(self, server: Server) -> str:
        """The name that a request asks for: adapters are models of their own."""
        return self.version if self.adapted else server.model

    def loaded(self, server: Server) -> set[str]:
        """The versions that the workers of a server have; of adapters those of this run."""
        if not self.adapted:
            return self.dialect.versions(server)
        own = self.version.rsplit("-", 1)[0]
        return {name for name in server.models() if name.startswith(own)}

    def load(self, server: Server) -> None:
        """Let a server load the weights of `version`, and check that all its workers have.

        Raises:
            Retry: it does not answer, or the first process has to give it weights first.
            UserError: it does not take them.
        """
        self._wake(server, "weights")  # alone: room for keys and values is taken once they are there
        if not server.way:
            self._find_way(server)
        if self.adapted:
            self._load_adapters(server)
        else:
            self._load_weights(server)
        self._wake(server, "kv_cache")
        if self.loaded(server) != {self.version}:
            raise server.not_taken()

    def _wake(self, server: Server, what: str) -> None:
        if what in server.asleep:
            self.dialect.wake(server, what)
            server.asleep.remove(what)

    def _load_adapters(self, server: Server) -> None:
        """Under a new name, so that nothing that was computed with others is found in the prefix cache."""
        for old in self.loaded(server) - {self.version}:
            self.dialect.unload_adapter(server, old)
        if self.version not in self.loaded(server):
            self.dialect.load_adapter(server, self.version, self._written())

    def _load_weights(self, server: Server) -> None:
        if server.way == "folder":
            self.dialect.load_folder(server, self._written(self._dtype(server)), self.version)
        else:
            self._broadcast(server)
        if not self.dialect.forget(server):
            raise Retry(f"{server.url} keeps its prefix cache, because others use it")
        if not self.dialect.commit(server, self.version):
            raise server.not_taken()

    def forget_way(self, server: Server) -> None:
        """Forget how a server got weights: it may be another now."""
        server.dtype = None
        if server.transfer is not None:
            server.transfer.close()
            server.transfer, server.way = None, ""

    # ------------------------------------------------------------------ ways

    def _find_way(self, server: Server) -> None:
        """The first of the possible ways by which weights get to a server; only the first process opens one.

        Raises:
            UserError: there is none.
        """
        self._main_only(server)
        why = ""
        for way in self._possible_ways(server):
            try:
                if way != "folder":
                    call = partial(self.dialect.call_workers, server)
                    server.transfer = Transfer(server.url, way, self.device, call)
            except TransferError as error:
                why += f"; {error}"
                log.warning("%s: weights do not get to %s by %s", self.dialect.name, server.url, error)
                continue
            server.way = way
            log.info("%s: weights go to %s by %s", self.dialect.name, server.url, way)
            return
        raise UserError(
            f"sampler.server.transfer: no way for the weights to {server.url}; name a folder that it sees "
            f"(--sampler.server.folder), or let it reach this machine{why}"
        )

    def _possible_ways(self, server: Server) -> list[str]:
        """What may be tried, best first; at the first update also what the workers of the server say."""
        if self.adapted:
            return ["folder"]
        places = self.dialect.places(server, self.folder)
        if not places:
            raise server.not_taken()
        server.dtype = common_dtype(places)
        all_see = all(place.sees_folder for place in places)
        if self.way == "folder" or not self.state:
            return ["folder"] if all_see else []
        if self.way != "auto":
            return [self.way]
        own_gpu, gpus = gpu_of(self.device), {place.gpu for place in places}
        ways = []
        if own_gpu and "" not in gpus and own_gpu not in gpus:
            ways.append("nccl")
        if all_see and all(place.is_heard for place in places):
            ways.append("folder")
        return [*ways, "gloo"]

    def _dtype(self, server: Server) -> str:
        if server.dtype is None:
            server.dtype = common_dtype(self.dialect.places(server, self.folder))
        return server.dtype

    def _broadcast(self, server: Server) -> None:
        self._main_only(server)
        assert server.transfer is not None
        try:
            tensors, dtype = checkpoint_tensors(self.policy, self.state), self._dtype(server)
            types = {name: self._sent_as(dtype, name, value) for name, value in tensors.items()}
            server.transfer.send(tensors, self.version, types)
        except TransferError as error:
            self.forget_way(server)
            raise Retry(f"{server.url} has not got the weights ({error})") from error

    def _main_only(self, server: Server) -> None:
        if not self.ranks.main:
            raise Retry(f"{server.url} waits for the first process to give it the weights")

    # ------------------------------------------------------------------ the folder

    def _version_folder(self, dtype: str) -> Path:
        return self.folder / (f"{self.version}-{dtype}" if dtype else self.version)

    def _written(self, dtype: str = "") -> Path:
        """The folder with the weights in a type; the first process writes it when it is needed."""
        folder = self._version_folder(dtype)
        with self._writing:
            if self.ranks.main and not folder.exists():
                if not self.state:
                    raise UserError(
                        f"sampler: a server was started anew in {dtype or 'fp32'}, which the others are not; start it "
                        "with the --dtype that it had"
                    )
                part = folder.with_suffix(".part")
                save_policy(self.policy, part, self._on_host(dtype))
                part.rename(folder)
        if not folder.exists():
            raise Retry(f"{folder} is not there yet")
        return folder

    def _on_host(self, dtype: str) -> dict[str, Tensor]:
        """The state in a type, cast before it leaves its device; tied tensors stay one."""
        made: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        state = {}
        for name, value in self.state.items():
            key = (value.data_ptr(), tuple(value.shape))
            if key not in made or not value.numel():
                made[key] = value.to(self._sent_as(dtype, name, value)).cpu()
            state[name] = made[key]
        return state


def common_dtype(places: Sequence[Place]) -> str:
    """The type of numbers that weights are cast to for a server; empty: they stay in fp32."""
    dtypes = {place.dtype for place in places}
    return "" if len(dtypes) != 1 or dtypes == {"float32"} else dtypes.pop()


def new_folder(parent: Path | None) -> Path:
    """An empty folder of the run's own; below a parent that was named, other users' servers may read it.

    Its file `lock` is locked as long as this process lives, so that folders of runs that were killed are known and go.
    """
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    where = (parent or (MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir()))).absolute()
    for old in where.glob("stepcredit-*/lock"):
        with suppress(OSError), old.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old.parent, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix="stepcredit-", dir=where))
    lock = (made / "unlocked").open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (made / "unlocked").rename(made / "lock")
    LOCKS.append(lock)
    if parent is not None:
        made.chmod(0o755)
    return made


def gpu_of(device: torch.device) -> str:
    """What tells a GPU from all others; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""

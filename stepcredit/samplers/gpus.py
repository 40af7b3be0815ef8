"""The GPUs of this machine that are left for a server."""

import os

import torch

from stepcredit.processes.ranks import Ranks


def free_gpus(device: torch.device, ranks: Ranks) -> list[str]:
    """The GPUs of this machine that no process of the run computes on, as CUDA_VISIBLE_DEVICES names them."""
    own = set(range(ranks.local_size)) if ranks.distributed else {device.index or 0}
    return [name for number, name in enumerate(_visible_gpus()) if number not in own]


def server_gpus(device: torch.device, ranks: Ranks) -> list[str] | None:
    """What a server of the run's own sees: GPUs that are free, else the run's first; None where it needs none."""
    visible = _visible_gpus()
    if device.type != "cuda" or not visible:
        return None
    return free_gpus(device, ranks) or [visible[0 if ranks.distributed else device.index or 0]]


def _visible_gpus() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in given.split(",")][:count] if given else [str(number) for number in range(count)]

"""What to change where a run does not fit: the largest micro-batch and rows that do, and options that make it fit."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stepcredit.config import Config
from stepcredit.plan.memory import (
    GIB,
    PASS,
    SAMPLING,
    Plan,
    estimate_memory,
    longest_path,
    plan_of,
    tokens_of_a_step,
)

log = logging.getLogger("stepcredit")

LARGEST_BUDGET = 1 << 24
MAX_GPUS = 256
LORA_RANK = 16
Options = dict[str, Any]  # `section.option` to value


@dataclass(frozen=True)
class Advice:
    """Options that make a run fit, and its plan with them."""

    options: str
    plan: Plan


def advise(config: Config, gpus: int, memory: float) -> list[Advice]:
    """Changes that make a run fit that does not, each checked by its own plan; the simplest first.

    Args:
        memory: bytes of a GPU.
    """
    shards: Options = {"distributed.strategy": "fsdp"}
    checkpointing: Options = {"train.gradient_checkpointing": True}
    changes: list[Options] = [{}, checkpointing]
    if gpus > 1:
        changes += [shards, shards | checkpointing]
    changes.append(shards | {"distributed.cpu_offload": True})
    if not config.lora.rank:
        changes += [{"lora.rank": LORA_RANK}, shards | {"lora.rank": LORA_RANK}]
    advice: list[Advice] = []
    for change in changes:
        one = _advice(config, change, gpus, memory, gpus)
        if one is not None and one.plan not in [other.plan for other in advice]:
            advice.append(one)
    for more_gpus in (gpus * factor for factor in (2, 4, 8, 16, 32) if gpus * factor <= MAX_GPUS):
        one = _advice(config, shards, more_gpus, memory, gpus)
        if one is not None:
            return [*advice, one]
    return advice


def _advice(config: Config, change: Options, gpus: int, memory: float, gpus_before: int) -> Advice | None:
    """A change, with fewer rows and a smaller budget where that is needed too; None where even these do not help."""
    change = {name: value for name, value in change.items() if _value(config, name) != value}
    changed = with_options(config, change)
    plan = plan_of(changed, gpus, memory)
    if plan.taken(SAMPLING) > plan.usable:
        change["sampler.max_rows"] = _rounded_down(largest_rows(changed, plan), 8)
    if plan.taken(PASS) > plan.usable:
        budget = _rounded_down(largest_budget(changed, plan), 256)
        change["optim.max_tokens_per_micro_batch"] = max(longest_path(changed), budget)
    plan = plan_of(with_options(changed, change), gpus, memory)
    if not plan.fits:
        return None
    words = [f"--gpus {gpus}"] if gpus != gpus_before else []
    words += [f"--{name.replace('_', '-')} {str(value).lower()}" for name, value in change.items()]
    return Advice(" ".join(words), plan)


def largest_budget(config: Config, plan: Plan) -> int:
    """The largest optim.max_tokens_per_micro_batch whose passes fit; 0 where not even the longest path does."""

    def fits(tokens: int) -> bool:
        changed = with_options(config, {"optim.max_tokens_per_micro_batch": tokens})
        return estimate_memory(changed, plan.gpus, plan.strategy, plan.memory).taken(PASS) <= plan.usable

    low = longest_path(config)
    high = max(low, min(LARGEST_BUDGET, tokens_of_a_step(config, plan.gpus)))
    return _largest(low, high, fits)


def fitting_budget(config: Config, gpus: int, memory: float, strategy: str) -> int:
    """What a run takes for optim.max_tokens_per_micro_batch: what is asked for, or the largest below it that fits.

    At least the longest path, which is never split, even where that does not fit.

    Args:
        memory: bytes of a GPU.
        strategy: "ddp" or "fsdp".
    """
    asked, plan = config.optim.max_tokens_per_micro_batch, estimate_memory(config, gpus, strategy, memory)
    if plan.taken(PASS) <= plan.usable:
        return asked
    return min(asked, max(longest_path(config), _rounded_down(largest_budget(config, plan), 256)))


def with_fitting_budget(config: Config, device: torch.device, gpus: int, strategy: str) -> Config:
    """The config with `fitting_budget` on a GPU, and a line in the log where that is lower; elsewhere as it is."""
    if device.type != "cuda":
        return config
    memory = torch.cuda.get_device_properties(device).total_memory
    asked, fitting = config.optim.max_tokens_per_micro_batch, fitting_budget(config, gpus, memory, strategy)
    if fitting == asked:
        return config
    log.warning(
        "micro-batches have at most %d tokens, not %d (optim.max_tokens_per_micro_batch): more would not fit into "
        "%.0f GiB, as 'stepcredit plan' reckons; --train.gradient-checkpointing true or more GPUs with "
        "--distributed.strategy fsdp leave room for more",
        fitting,
        asked,
        memory / GIB,
    )
    return with_options(config, {"optim.max_tokens_per_micro_batch": fitting})


def largest_rows(config: Config, plan: Plan) -> int:
    """The largest sampler.max_rows, up to what is asked for, whose sampling fits; 0 where one row does not."""

    def fits(rows: int) -> bool:
        changed = with_options(config, {"sampler.max_rows": rows})
        return estimate_memory(changed, plan.gpus, plan.strategy, plan.memory).taken(SAMPLING) <= plan.usable

    return _largest(1, config.sampler.max_rows, fits)


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number in [low, high] that fits, where all smaller ones fit too; 0 when none does."""
    if not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _rounded_down(number: int, step: int) -> int:
    """To a multiple of `step`; a number below `step` stays as it is, 0 becomes 1."""
    return number // step * step or max(1, number)


def _value(config: Config, name: str) -> Any:
    section, option = name.split(".")
    return getattr(getattr(config, section), option)


def with_options(config: Config, options: Options) -> Config:
    """A config with other values of some options."""
    for name, value in options.items():
        section, option = name.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={option: value})})
    return config

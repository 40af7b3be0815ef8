"""The credit functions of this package as advantage estimators of verl, an advantage for every token.

With both installed `import verl` loads this module (entry point `verl.plugins`). Then

    algorithm.adv_estimator=stepcredit_spro +algorithm.stepcredit.beta=0.05

takes a credit function by its name, with its options under one key, and

    algorithm.adv_estimator=stepcredit +algorithm.stepcredit.name=my_module.my_credit

one of your own. See docs/verl.md. Tested with verl 0.9.1. verl gives estimators rewards and mask alone; so that credit
functions can read log-probabilities, `compute_advantage` of `verl.trainer.ppo.ray_trainer` is wrapped when that module
is imported: the wrapper notes the batch and calls it.
"""

import functools
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import verl
from torch import Tensor
from verl.trainer.ppo import core_algos

from stepcredit.adapters.rows import credit_rows, flat_credit
from stepcredit.credit import CREDIT
from stepcredit.credit.base import needs_of
from stepcredit.errors import UserError

TESTED = "0.9"
PREFIX = "stepcredit"
TRAINER = "verl.trainer.ppo.ray_trainer"  # compute_advantage is defined there; the others import it from there
COLUMNS = {"old_logprobs": "old_log_probs", "ref_logprobs": "ref_log_prob"}  # ours and verl's
HINTS = {
    "ref_logprobs": "actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0 computes it",
    "prm_logprobs": "they are those of a process reward model, which a worker of yours adds to the batch, [B, T]; "
    "'stepcredit train --algorithm prime' trains one beside the policy, and so does the adapter for TRL",
}

log = logging.getLogger("stepcredit")
_batch: ContextVar[Mapping[str, Tensor] | None] = ContextVar("batch", default=None)

Estimator = Callable[..., tuple[Tensor, Tensor]]


def estimator(name: str | None = None) -> Estimator:
    """An advantage estimator of verl.

    Args:
        name: of a credit function; None takes it from the option `algorithm.stepcredit.name`.
    """

    def estimate(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Any = None,
        config: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """Advantages [B, T], twice: verl logs returns, and trains a critic on them where there is one."""
        given = _options(config)
        chosen = given.pop("name", None) if name is None else name
        if chosen is None:
            raise UserError("algorithm.stepcredit.name is not set: which credit function?")
        if index is None:
            raise UserError(f"credit '{chosen}' compares completions of one prompt, and verl gave no 'uid'")
        mask = response_mask.bool()
        outcome, dense = split_rewards(token_level_rewards, mask)
        columns = _columns(str(chosen), given) | ({"token_rewards": dense} if bool(dense.any()) else {})
        advantages = credit_rows(str(chosen), _groups(index), mask, outcome, columns, **given)
        return advantages, advantages

    estimate.__name__ = PREFIX if name is None else f"{PREFIX}_{name}"
    return estimate


def split_rewards(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """verl's token rewards as an outcome [B] and rewards of tokens [B, T].

    The outcome is what stands on the last sampled token, where verl puts the score of a completion, and what stands on
    tokens that the policy did not sample, which verl's estimators count as well.
    """
    position = torch.arange(mask.shape[1], device=mask.device)
    last = (position * mask).amax(1, keepdim=True)
    dense = torch.where(mask & (position != last), rewards, 0.0)
    return (rewards - dense).sum(1), dense


def _options(config: Any) -> dict[str, Any]:
    given = None if config is None else config.get(PREFIX, None)
    if given is None:
        return {}
    if not isinstance(given, Mapping) and not hasattr(given, "items"):
        raise UserError(f"algorithm.{PREFIX}: expected a section of options, got {given!r:.60}")
    return dict(given.items())


def _groups(index: Any) -> Sequence[Any]:
    values = index.tolist() if hasattr(index, "tolist") else list(index)
    return [str(value) for value in values]


def _columns(name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The columns that a credit function reads, from the batch that `compute_advantage` was called with."""
    columns = {}
    batch = _batch.get()
    for column in needs_of(flat_credit(name, options)).columns:
        theirs = COLUMNS.get(column, column)
        if column == "token_rewards":
            continue
        if batch is None:
            raise UserError(
                f"credit '{name}' reads '{column}', but verl called the estimator without {TRAINER}.compute_advantage"
            )
        values = batch.get(theirs)
        if values is None:
            hint = HINTS.get(column, "a worker of yours can add it to the batch, [B, T]")
            raise UserError(f"credit '{name}' reads '{theirs}', which this batch does not have; {hint}")
        columns[column] = values
    return columns


# ---------------------------------------------------------------------- what verl calls


def register() -> None:
    """Put an estimator for each credit function into verl's registry, and the wrapper around `compute_advantage`.

    Those of trees are there as well: they say so when they are called.

    Raises:
        UserError: verl has no registry of estimators.
    """
    if not hasattr(core_algos, "register_adv_est"):
        raise UserError(f"verl {verl.__version__} has no register_adv_est; the adapter was tested with verl {TESTED}")
    if not verl.__version__.startswith(f"{TESTED}."):
        log.warning("verl is %s; the adapter was tested with %s", verl.__version__, TESTED)
    for name in (None, *CREDIT):
        one = estimator(name)
        core_algos.register_adv_est(one.__name__)(one)
    if TRAINER in sys.modules:
        wrap(sys.modules[TRAINER])
    else:
        sys.meta_path.insert(0, _WhenImported())


def wrap(module: ModuleType) -> None:
    """Replace `compute_advantage` of a module, and of those that took it from there before.

    Raises:
        UserError: the module has none, or it takes other arguments.
    """
    plain = getattr(module, "compute_advantage", None)
    if plain is None or list(inspect.signature(plain).parameters)[:2] != ["data", "adv_estimator"]:
        raise UserError(
            f"verl {verl.__version__} has no compute_advantage(data, adv_estimator, ...) in {module.__name__}; the "
            f"adapter was tested with verl {TESTED}"
        )

    @functools.wraps(plain)
    def compute_advantage(data: Any, adv_estimator: Any, *args: Any, **named: Any) -> Any:
        with _noted(data.batch):
            return plain(data, adv_estimator, *args, **named)

    for other in list(sys.modules.values()):
        if getattr(other, "__dict__", {}).get("compute_advantage") is plain:
            other.compute_advantage = compute_advantage  # type: ignore[attr-defined]


@contextmanager
def _noted(batch: Mapping[str, Tensor]) -> Iterator[None]:
    token = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(token)


class _WhenImported(MetaPathFinder):
    """Wraps `compute_advantage` once its module is imported, which only the process of the trainer does."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Wrapping(spec.loader)
        return spec


class _Wrapping(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        wrap(module)


register()

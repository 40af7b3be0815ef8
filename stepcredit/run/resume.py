"""What a checkpoint holds of a run beside the weights. Problems and seeds follow from the number drawn."""

import hashlib
import logging
from typing import TYPE_CHECKING, Any

from stepcredit.errors import UserError
from stepcredit.run.observing import restored_states, shaper_state
from stepcredit.run.source import Position, without_carried
from stepcredit.run.state import random_state, set_random_state
from stepcredit.run.work import Work
from stepcredit.tasks.base import canonical

if TYPE_CHECKING:
    from stepcredit.run.trainer import Trainer

log = logging.getLogger("stepcredit")


def run_state(trainer: "Trainer") -> dict[str, Any]:
    """Everything but the weights and the state of the optimisers."""
    state: dict[str, Any] = {
        "iteration": trainer.done,
        "position": trainer.source.position.state_dict(),
        "models": {name: estimator.state_dict() for name, estimator in trainer.estimators.items()},
        "shapers": shaper_state(trainer.parts.shapers, trainer.shaper_states),
        "entropy": trainer.entropy.state_dict(),
        "random": random_state(),
        "max_tokens": trainer.learner.max_tokens,
        "nonfinite": trainer.nonfinite,
        "data": data_state(trainer),
        "config": trainer.config.model_dump(mode="json", exclude={"run_dir"}),
    }
    if trainer.policy_update.text is not None:
        state["text"] = trainer.policy_update.text.state_dict()
    if trainer.work is not None:
        state["work"] = trainer.work.state_dict(trainer.policy_update.shape)
    return state


def restore(trainer: "Trainer", state: dict[str, Any]) -> None:
    """The inverse of `run_state`.

    Raises:
        UserError: the rows are not those that the run began with.
    """
    check_data(trainer, state.get("data"), state["config"]["eval"]["num_problems"])
    trainer.done, trainer.resumed = state["iteration"], True
    trainer.source.position = Position.from_state(state["position"])
    for name, estimator in trainer.estimators.items():
        if name in state["models"]:
            estimator.load_state_dict(state["models"][name])
    trainer.shaper_states = restored_states(trainer.parts.shapers, state.get("shapers", []))
    trainer.entropy.load_state_dict(state.get("entropy", {}))
    set_random_state(state["random"])
    trainer.learner.max_tokens = min(trainer.learner.max_tokens, state["max_tokens"])
    stopped_for_it = state["nonfinite"] >= trainer.config.optim.max_nonfinite
    trainer.nonfinite = 0 if stopped_for_it else state["nonfinite"]
    if trainer.policy_update.text is not None and "text" in state:
        trainer.policy_update.text.load_state_dict(state["text"], trainer.config.checkpoint.changed_data)
    if "work" in state:
        trainer.work = Work.from_state(state["work"], trainer.policy_update.shape)
    if not trainer.config.sampler.window:
        _leave_out_carried(trainer)


def _leave_out_carried(trainer: "Trainer") -> None:
    """Without a window nothing goes on with completions that the run has carried."""
    trainer.source.position, lost = without_carried(trainer.source.position)
    if trainer.work is not None:
        trainer.work.position, lost = without_carried(trainer.work.position)
    if lost:
        log.warning(
            "--resume: %d completions had not ended, and without sampler.window nothing goes on with them; they are "
            "left out, their problems too",
            lost,
        )


def data_state(trainer: "Trainer") -> dict[str, str]:
    """Fingerprints of the contents of the problems, wherever they lie."""
    held_out = hashlib.sha256(b"".join(canonical(problem) for problem in trainer.held_out))
    return {
        "training problems": trainer.fingerprint,
        "held-out problems": held_out.hexdigest(),
    }


def check_data(trainer: "Trainer", saved: dict[str, str] | None, num_held_out: int) -> None:
    """Stop where the problems have changed, unless the config says to go on.

    Args:
        saved: None in checkpoints of before there were fingerprints.
        num_held_out: held-out problems that were asked for; of another number nothing can be compared.
    """
    if saved is None:
        log.warning("--resume: the checkpoint does not say what its data were, so they cannot be compared")
        return
    now = data_state(trainer)
    if num_held_out != trainer.config.eval.num_problems:
        now["held-out problems"] = saved["held-out problems"]
    changed = " and ".join(name for name, fingerprint in saved.items() if now[name] != fingerprint)
    if not changed:
        return
    name = trainer.rollouts.task.name
    if trainer.config.checkpoint.changed_data == "stop":
        raise UserError(
            f"--resume: the {changed} of {name} are not those that the run began with (rows added, changed or in "
            "another order); put the data back, start a new run, or go on all the same with --checkpoint.changed-data "
            "continue"
        )
    log.warning("continuing with other %s of %s than the run began with", changed, name)

"""What a checkpoint holds of a run beside the weights. Problems and seeds follow from the number drawn."""

from typing import TYPE_CHECKING, Any

from stepcredit.run.source import Position
from stepcredit.run.state import random_state, set_random_state
from stepcredit.run.work import Work

if TYPE_CHECKING:
    from stepcredit.run.trainer import Trainer


def run_state(trainer: "Trainer") -> dict[str, Any]:
    """Everything but the weights and the state of the optimisers."""
    state: dict[str, Any] = {
        "iteration": trainer.done,
        "position": vars(trainer.source.position),
        "models": {name: estimator.state_dict() for name, estimator in trainer.estimators.items()},
        "random": random_state(),
        "max_tokens": trainer.learner.max_tokens,
        "nonfinite": trainer.nonfinite,
        "config": trainer.config.model_dump(mode="json", exclude={"run_dir"}),
    }
    if trainer.work is not None:
        state["work"] = trainer.work.state_dict(trainer.policy_update.shape)
    return state


def restore(trainer: "Trainer", state: dict[str, Any]) -> None:
    """The inverse of `run_state`."""
    trainer.done, trainer.resumed = state["iteration"], True
    trainer.source.position = Position.from_state(state["position"])
    for name, estimator in trainer.estimators.items():
        if name in state["models"]:
            estimator.load_state_dict(state["models"][name])
    set_random_state(state["random"])
    trainer.learner.max_tokens = min(trainer.learner.max_tokens, state["max_tokens"])
    stopped_for_it = state["nonfinite"] >= trainer.config.optim.max_nonfinite
    trainer.nonfinite = 0 if stopped_for_it else state["nonfinite"]
    if "work" in state:
        trainer.work = Work.from_state(state["work"], trainer.policy_update.shape)

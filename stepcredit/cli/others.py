"""Names that options have in TRL and verl, so that a user of these is told ours. None of them is taken as an option."""

from collections.abc import Callable
from typing import Any, NamedTuple

from stepcredit.errors import UserError


def _same(value: Any) -> Any:
    return value


def _words(value: Any) -> Any:
    """A list of places as one text."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _at_least_0(value: Any) -> Any:
    """A number of things that is -1 where there is no limit, or where something is off; 0 here."""
    return max(0, value) if isinstance(value, (int, float)) else value


class Option(NamedTuple):
    """An option of TRL and verl: what it is here, and what differs.

    Attributes:
        convert: of a value of theirs to ours; None: it takes several options (`from_trl.py`, `from_verl.py`).
    """

    trl: tuple[str, ...]
    verl: tuple[str, ...]
    here: str
    note: str = ""
    convert: Callable[[Any], Any] | None = None


# docs/migrating.md has the same table (tests/test_migrating.py).
OPTIONS = [
    Option(("model_name_or_path",), ("actor_rollout_ref.model.path",), "--model", convert=_same),
    Option(("dataset_name",), ("data.train_files",), "--data", convert=_words),
    Option(("eval_dataset",), ("data.val_files",), "--task.eval-data", convert=_words),
    Option(("num_generations",), ("actor_rollout_ref.rollout.n",), "--group-size", convert=_same),
    Option(
        ("generation_batch_size",),
        ("data.train_batch_size",),
        "--train.problems-per-iteration",
        "problems; TRL's counts completions",
    ),
    Option(("num_iterations",), ("actor_rollout_ref.actor.ppo_epochs",), "--optim.num-epochs", convert=_same),
    Option(
        ("steps_per_generation",),
        ("actor_rollout_ref.actor.ppo_mini_batch_size",),
        "--optim.num-minibatches",
        "optimiser steps a batch",
    ),
    Option(
        ("per_device_train_batch_size", "gradient_accumulation_steps"),
        ("actor_rollout_ref.actor.ppo_max_token_len_per_gpu", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"),
        "--optim.max-tokens-per-micro-batch",
        "tokens; results do not depend on it",
    ),
    Option(("max_completion_length",), ("data.max_response_length",), "--max-new-tokens", convert=_same),
    Option((), ("actor_rollout_ref.rollout.temperature",), "--temperature", convert=_same),
    Option((), ("actor_rollout_ref.actor.optim.lr",), "--learning-rate", convert=_same),
    Option(
        (),
        ("actor_rollout_ref.actor.kl_loss_coef",),
        "--objective.kl.coef",
        "with --objective.kl.estimator k2 or k3",
    ),
    Option(
        ("epsilon",),
        ("actor_rollout_ref.actor.clip_ratio", "actor_rollout_ref.actor.clip_ratio_low"),
        "--loss.clip-low",
        "and --loss.clip-high, which does not follow it",
    ),
    Option(("epsilon_high",), ("actor_rollout_ref.actor.clip_ratio_high",), "--loss.clip-high"),
    Option(("delta",), ("actor_rollout_ref.actor.clip_ratio_c",), "--loss.dual-clip", convert=_same),
    Option(
        ("loss_type",),
        ("actor_rollout_ref.actor.loss_agg_mode",),
        "--objective.aggregate",
        "'dapo' and 'token-mean' are token_mean",
    ),
    Option(
        ("scale_rewards",),
        ("algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo"),
        "--algorithm",
        "or --credit.name; without the std it is dr_grpo",
    ),
    Option((), ("algorithm.filter_groups.enable",), "--filter.enabled"),
    Option(
        ("reward_funcs",), ("custom_reward_function.path", "reward.custom_reward_function.path"), "--reward.functions"
    ),
    Option(("reward_weights",), (), "--reward.weights", convert=_same),
    Option(("max_steps",), ("trainer.total_training_steps",), "--iterations", "batches, not optimiser steps"),
    Option(("output_dir",), ("trainer.default_local_dir",), "--run-dir", convert=_same),
    Option(("report_to",), ("trainer.logger",), "--track.sinks"),
    Option(("resume_from_checkpoint",), ("trainer.resume_mode",), "--resume"),
    Option(("save_steps",), ("trainer.save_freq",), "--save-every"),
    Option(("eval_steps",), ("trainer.test_freq",), "--eval-every"),
    Option(("max_grad_norm",), ("actor_rollout_ref.actor.optim.clip_grad",), "--optim.grad-clip", convert=_same),
    Option(("warmup_steps",), ("actor_rollout_ref.actor.optim.lr_warmup_steps",), "--optim.warmup", "iterations"),
    Option(("lr_scheduler_type",), ("actor_rollout_ref.actor.optim.lr_scheduler_type",), "--optim.schedule"),
    Option(("lora_r",), ("actor_rollout_ref.model.lora_rank",), "--lora.rank"),
    Option(("lora_alpha",), ("actor_rollout_ref.model.lora_alpha",), "--lora.alpha"),
    Option(("weight_decay",), ("actor_rollout_ref.actor.optim.weight_decay",), "--optim.weight-decay", convert=_same),
    Option(("entropy_coef",), ("actor_rollout_ref.actor.entropy_coeff",), "--objective.entropy-coef", convert=_same),
    Option(("top_p",), ("actor_rollout_ref.rollout.top_p",), "--sampler.top-p", convert=_same),
    Option(("top_k",), ("actor_rollout_ref.rollout.top_k",), "--sampler.top-k", convert=_at_least_0),
    Option(
        ("gradient_checkpointing",),
        ("actor_rollout_ref.model.enable_gradient_checkpointing",),
        "--train.gradient-checkpointing",
        convert=_same,
    ),
    Option(("bf16",), (), "--train.dtype", "bfloat16"),
    Option(("use_vllm",), ("actor_rollout_ref.rollout.name",), "--sampler.name", "vllm"),
]
# One name, several meanings: none is chosen for the user.
AMBIGUOUS = {
    "beta": "it is the KL coefficient in TRL (--objective.kl.coef here), and a scale of spro and prime (--credit.beta)"
}


GENERIC = {"path", "name", "n", "enable", "lr"}  # last words of verl's options that say nothing alone


def answer(name: str) -> str | None:
    """What to say of an option that TRL or verl has; None for others. verl's may be without their sections.

    >>> answer("num-generations")
    "TRL's num_generations is --group-size here"
    """
    name = name.replace("-", "_")
    if name in AMBIGUOUS:
        return AMBIGUOUS[name]
    for option in OPTIONS:
        note = f" ({option.note})" if option.note else ""
        if name in option.trl:
            return f"TRL's {name} is {option.here} here{note}"
        for theirs in option.verl:
            last = theirs.rpartition(".")[2]
            if name == theirs or (name == last and last not in GENERIC):
                return f"verl's {theirs} is {option.here} here{note}"
    return None


def check_assignment(word: str, command: str) -> None:
    """Raise `UserError` for a word of Hydra with an option of verl, such as `data.train_batch_size=256`."""
    name, equals, _ = word.lstrip("+").partition("=")
    said = answer(name) if equals and "." in name else None
    if said:
        raise UserError(f"{command}: '{word}': {said}; options are written --name value")

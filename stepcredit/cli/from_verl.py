"""Our config from one of verl: its YAML, or the overrides of Hydra (verl 0.9.1)."""

from typing import Any

from stepcredit.cli.conversion import Conversion, Remark, whole
from stepcredit.cli.others import OPTIONS
from stepcredit.errors import UserError

ACTOR, ROLLOUT, OPTIM = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.actor.optim"
# Of verl's ppo_trainer.yaml, where they are not ours or take part in a conversion.
DEFAULTS: dict[str, Any] = {
    f"{ROLLOUT}.n": 1,
    f"{ROLLOUT}.temperature": 1.0,
    f"{ROLLOUT}.top_p": 1.0,
    f"{ROLLOUT}.top_k": -1,
    "data.train_batch_size": 1024,
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    "data.truncation": "error",
    f"{ACTOR}.ppo_mini_batch_size": 256,
    f"{ACTOR}.ppo_epochs": 1,
    f"{OPTIM}.lr": 1e-6,
    f"{OPTIM}.weight_decay": 0.01,
    f"{OPTIM}.clip_grad": 1.0,
    f"{OPTIM}.lr_scheduler_type": "constant",
    f"{OPTIM}.lr_warmup_steps": -1,
    f"{OPTIM}.lr_warmup_steps_ratio": 0.0,
    f"{ACTOR}.clip_ratio_low": 0.2,
    f"{ACTOR}.clip_ratio_high": 0.2,
    f"{ACTOR}.clip_ratio_c": 3.0,
    f"{ACTOR}.loss_agg_mode": "token-mean",
    f"{ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{ACTOR}.entropy_coeff": 0.0,
    f"{ACTOR}.kl_loss_coef": 0.001,
    f"{ACTOR}.kl_loss_type": "low_var_kl",
    "algorithm.adv_estimator": "gae",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "algorithm.kl_penalty": "kl",
    "algorithm.kl_ctrl.kl_coef": 0.001,
    "algorithm.kl_ctrl.type": "fixed",
    "critic.optim.lr": 1e-5,
    "critic.optim.weight_decay": 0.01,
    "critic.cliprange_value": 0.5,
    "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    "actor_rollout_ref.model.lora_rank": 0,
    "actor_rollout_ref.model.lora_alpha": 16,
    "trainer.total_epochs": 30,
    "trainer.save_freq": -1,
    "trainer.test_freq": -1,
}
ALGORITHMS = {
    "gae": "ppo",
    "grpo": "grpo",
    "rloo": "rloo",
    "rloo_vectorized": "rloo",
    "opo": "opo",
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
    "remax": "remax",
    "gpg": "gpg",
}
AGGREGATES = {
    "token-mean": "token_mean",
    "seq-mean-token-mean": "seq_mean_token_mean",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "sum_over_constant",
}
LOSSES = {"vanilla": "clip", "gspo": "gspo", "cispo": "cispo", "gpg": "reinforce"}
KL_LOSSES = {"low_var_kl": "k3", "k3": "k3", "mse": "k2", "k2": "k2"}
SCHEDULES = {"constant": "constant", "cosine": "cosine", "linear": "linear"}
BUDGET = "how a step is cut changes nothing here; see --optim.max-tokens-per-micro-batch"
PLACES = "how models lie on GPUs is --distributed.* here, and torchrun starts the processes"
SAMPLER = "an option of verl's engine; see --sampler.server and docs/vllm.md"
KNOWN = {
    f"{ACTOR}.ppo_micro_batch_size": BUDGET,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": BUDGET,
    f"{ACTOR}.use_dynamic_bsz": BUDGET,
    f"{ACTOR}.fsdp_config": PLACES,
    f"{ACTOR}.strategy": PLACES,
    f"{ACTOR}.ulysses_sequence_parallel_size": PLACES,
    "actor_rollout_ref.ref": "the reference is placed and cut as the policy is",
    "actor_rollout_ref.model.use_remove_padding": "there is no padding here",
    ROLLOUT: SAMPLER,
    "trainer.nnodes": PLACES,
    "trainer.n_gpus_per_node": PLACES,
    "trainer.device": "see --device",
    "trainer.experiment_name": "a run has the name of its folder: --run-dir",
    "trainer.resume_mode": "give --resume to stepcredit train",
    "trainer.resume_from_path": "give --resume to stepcredit train",
    "trainer.val_before_train": "a run begins and ends with an evaluation",
    "data.val_batch_size": "how an evaluation is cut changes nothing here",
    "data.reward_fn_key": "rows of kinds are judged by --reward.kinds",
    "reward_model": "a reward model is called by a function of your own: --reward.functions",
    "critic": "see --critic.*",
    "defaults": "files of verl are not read",
    "hydra": "of Hydra",
    "ray_kwargs": "there is no Ray here",
}


def from_verl(conversion: Conversion) -> None:
    """Write our options.

    Raises:
        UserError: a value is of another type.
    """
    conversion.take_table(OPTIONS)
    credit = _algorithm(conversion)
    loss = _loss(conversion, credit)
    _kl(conversion, credit)
    _batches(conversion)
    _lengths(conversion)
    _optimiser(conversion)
    _data_and_rewards(conversion)
    _parts(conversion)
    if loss == "gspo":
        conversion.put("objective.aggregate", "seq_mean_token_mean", f"{ACTOR}.loss_agg_mode")
        conversion.differs(f"{ACTOR}.loss_agg_mode", "verl's gspo takes seq-mean-token-mean, whatever is given")
    conversion.leave_out_rest(KNOWN)


def _algorithm(conversion: Conversion) -> str:
    name = str(conversion.get("algorithm.adv_estimator"))
    if name not in ALGORITHMS:
        raise UserError(
            f"verl's algorithm.adv_estimator: '{name}' has no counterpart; there are {', '.join(ALGORITHMS)}"
        )
    chosen = ALGORITHMS[name]
    with_std = conversion.get("algorithm.norm_adv_by_std_in_grpo")
    if chosen == "grpo" and not with_std:
        chosen = "dr_grpo"
    conversion.put("algorithm", chosen, "algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo")
    gamma, lam = conversion.number("algorithm.gamma"), conversion.number("algorithm.lam")
    if chosen == "ppo":
        conversion.put("credit.gamma", gamma, "algorithm.gamma")
        conversion.put("credit.lam", lam, "algorithm.lam")
        _critic(conversion)
    elif chosen == "reinforce_pp":
        conversion.put("credit.gamma", gamma, "algorithm.gamma")
    else:
        for given, value in (("algorithm.gamma", gamma), ("algorithm.lam", lam)):
            if conversion.has(given):
                conversion.leave_out(given, f"{name} has none" if value == 1 else f"{name} has none here")
    if conversion.ours["growth.group_size"] == 1 and chosen in ("grpo", "dr_grpo", "rloo", "opo"):
        conversion.differs(
            "algorithm.adv_estimator", "a group of one completion has advantage 0 here, in verl its reward"
        )
    if conversion.get("algorithm.filter_groups.enable"):
        conversion.put("filter.enabled", True, "algorithm.filter_groups.enable")
        conversion.put("filter.keep", "varied", "algorithm.filter_groups.enable")
        most = conversion.number("algorithm.filter_groups.max_num_gen_batches")
        if most:
            conversion.put("filter.max_draws", most, "algorithm.filter_groups.max_num_gen_batches")
    return chosen


def _critic(conversion: Conversion) -> None:
    for name, path in (
        ("critic.optim.lr", "critic.learning_rate"),
        ("critic.optim.weight_decay", "critic.weight_decay"),
        ("critic.cliprange_value", "critic.clip"),
    ):
        conversion.put(path, conversion.number(name), name)
    if conversion.has("critic.model.path"):
        conversion.put("critic.model", conversion.get("critic.model.path"), "critic.model.path")
    if conversion.number("critic.ppo_epochs"):
        conversion.put("critic.num_epochs", conversion.number("critic.ppo_epochs"), "critic.ppo_epochs")
    if conversion.number("trainer.critic_warmup"):
        conversion.put("critic.warmup", conversion.number("trainer.critic_warmup"), "trainer.critic_warmup")


def _loss(conversion: Conversion, algorithm: str) -> str:
    mode = str(conversion.get(f"{ACTOR}.policy_loss.loss_mode"))
    loss = LOSSES.get(mode, "clip")
    if mode not in LOSSES:
        conversion.leave_out(f"{ACTOR}.policy_loss.loss_mode", "no such loss; the clipped one is written in its place")
    conversion.put("loss.name", loss, f"{ACTOR}.policy_loss.loss_mode")
    if algorithm == "opo" and loss == "clip":
        conversion.differs(
            "algorithm.adv_estimator", "opo here is exactly on-policy; with a ratio it is written as in verl"
        )
    low, high = conversion.number(f"{ACTOR}.clip_ratio_low"), conversion.number(f"{ACTOR}.clip_ratio_high")
    if conversion.has(f"{ACTOR}.clip_ratio"):
        both = conversion.number(f"{ACTOR}.clip_ratio")
        if conversion.has(f"{ACTOR}.clip_ratio_low") or conversion.has(f"{ACTOR}.clip_ratio_high"):
            conversion.leave_out(f"{ACTOR}.clip_ratio", "clip_ratio_low and clip_ratio_high say it")
        elif both != low:
            text = f"without effect in verl, whose clip_ratio_low and _high are {low:g} and {high:g}; they are written"
            conversion.differs(f"{ACTOR}.clip_ratio", text)
    if loss != "reinforce":
        conversion.put("loss.clip_low", low, f"{ACTOR}.clip_ratio_low")
        conversion.put("loss.clip_high", high, f"{ACTOR}.clip_ratio_high")
    else:
        conversion.leave_out(f"{ACTOR}.clip_ratio_low", f"the loss {mode} has no clip")
        conversion.leave_out(f"{ACTOR}.clip_ratio_high", f"the loss {mode} has no clip")
    if loss != "clip" and conversion.take_back("loss.dual_clip"):
        conversion.leave_out(f"{ACTOR}.clip_ratio_c", f"the loss {mode} has no dual clip")
    aggregate = str(conversion.get(f"{ACTOR}.loss_agg_mode"))
    if aggregate in AGGREGATES:
        conversion.put("objective.aggregate", AGGREGATES[aggregate], f"{ACTOR}.loss_agg_mode")
        if aggregate == "seq-mean-token-sum-norm":
            text = "the constant is max_response_length here, by default the padded width of a micro-batch in verl"
            conversion.differs(f"{ACTOR}.loss_agg_mode", text)
    else:
        conversion.leave_out(f"{ACTOR}.loss_agg_mode", "no such mean; the algorithm's own is taken")
    return loss


def _kl(conversion: Conversion, algorithm: str) -> None:
    in_loss, in_reward = conversion.get(f"{ACTOR}.use_kl_loss"), conversion.get("algorithm.use_kl_in_reward")
    if in_loss and in_reward:
        conversion.leave_out("algorithm.use_kl_in_reward", "one KL term is kept, that of the loss")
        in_reward = False
    if in_loss:
        kind = str(conversion.get(f"{ACTOR}.kl_loss_type")).removesuffix("+")
        coef = conversion.number(f"{ACTOR}.kl_loss_coef")
        conversion.put("objective.kl.coef", coef, f"{ACTOR}.kl_loss_coef")
        conversion.put("objective.kl.estimator", KL_LOSSES.get(kind, "k3"), f"{ACTOR}.kl_loss_type")
        if kind not in KL_LOSSES:
            conversion.differs(
                f"{ACTOR}.kl_loss_type", f"{kind}: a KL term in the loss is k2 or k3 here; k3 is written"
            )
    elif in_reward:
        coef = conversion.number("algorithm.kl_ctrl.kl_coef")
        conversion.put("objective.kl.coef", coef, "algorithm.kl_ctrl.kl_coef")
        conversion.put("objective.kl.estimator", "k1", "algorithm.kl_penalty")
        kind, control = conversion.get("algorithm.kl_penalty"), conversion.get("algorithm.kl_ctrl.type")
        if kind not in ("kl", "k1"):
            conversion.differs("algorithm.kl_penalty", f"{kind}: a KL term in the reward is k1 here")
        if control != "fixed":
            conversion.differs("algorithm.kl_ctrl.type", f"{control}: the coefficient stays {coef:g} here")
    else:
        conversion.put("objective.kl.coef", 0.0, f"{ACTOR}.use_kl_loss", "algorithm.use_kl_in_reward")
    for name, used in (
        (f"{ACTOR}.kl_loss_coef", in_loss),
        (f"{ACTOR}.kl_loss_type", in_loss),
        ("algorithm.kl_ctrl.kl_coef", in_reward),
        ("algorithm.kl_penalty", in_reward),
    ):
        if not used:
            conversion.leave_out(name, f"it is off ({'use_kl_loss' if name.startswith(ACTOR) else 'use_kl_in_reward'})")


def _batches(conversion: Conversion) -> None:
    problems, part = conversion.number("data.train_batch_size"), conversion.number(f"{ACTOR}.ppo_mini_batch_size")
    if not problems or not part:
        raise UserError("verl's data.train_batch_size and ppo_mini_batch_size must be above 0")
    conversion.put("train.problems_per_iteration", whole(problems), "data.train_batch_size")
    names = ("data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size")
    conversion.put("optim.num_minibatches", whole(problems / part), *names)
    if problems % part:
        conversion.differs(
            names[1], f"{part:g} does not divide {problems:g}; {whole(problems / part)} steps of equal size"
        )
    budget = conversion.number(f"{ACTOR}.ppo_max_token_len_per_gpu")
    if budget is not None:
        conversion.put("optim.max_tokens_per_micro_batch", whole(budget), f"{ACTOR}.ppo_max_token_len_per_gpu")


def _lengths(conversion: Conversion) -> None:
    """verl counts in batches, as we do."""
    steps = conversion.number("trainer.total_training_steps")
    if steps:
        conversion.put("train.iterations", whole(steps), "trainer.total_training_steps")
        conversion.leave_out("trainer.total_epochs", "total_training_steps says how long")
    else:
        epochs = conversion.number("trainer.total_epochs")
        text = f"verl passes {epochs:g} times over the problems: passes x problems / train.problems_per_iteration"
        conversion.to_give.append(Remark("--iterations", text))
    for name, path in (("trainer.save_freq", "checkpoint.every"), ("trainer.test_freq", "eval.every")):
        conversion.put(path, max(0, int(conversion.number(name) or 0)), name)
    kept = conversion.number("trainer.max_actor_ckpt_to_keep")
    if kept:
        conversion.put("checkpoint.keep", whole(kept), "trainer.max_actor_ckpt_to_keep")


def _optimiser(conversion: Conversion) -> None:
    if conversion.has(f"{ACTOR}.grad_clip"):  # its name before 0.9
        conversion.put("optim.grad_clip", conversion.number(f"{ACTOR}.grad_clip"), f"{ACTOR}.grad_clip")
    schedule = str(conversion.get(f"{OPTIM}.lr_scheduler_type", f"{OPTIM}.warmup_style"))
    if schedule in SCHEDULES:
        names = (f"{OPTIM}.lr_scheduler_type", f"{OPTIM}.warmup_style")
        conversion.put("optim.schedule", SCHEDULES[schedule], *names)
    else:
        conversion.leave_out(f"{OPTIM}.lr_scheduler_type", "the rate stays constant")
    batches, share = conversion.number(f"{OPTIM}.lr_warmup_steps"), conversion.number(f"{OPTIM}.lr_warmup_steps_ratio")
    steps = conversion.ours["optim.num_minibatches"] * int(conversion.ours["optim.num_epochs"])
    if batches is not None and batches > 0:
        conversion.put("optim.warmup", whole(batches), f"{OPTIM}.lr_warmup_steps")
        conversion.leave_out(f"{OPTIM}.lr_warmup_steps_ratio", "lr_warmup_steps says it")
        if steps > 1:
            conversion.differs(f"{OPTIM}.lr_warmup_steps", "iterations here; count again if yours were optimiser steps")
    elif share:
        total = conversion.ours.get("train.iterations")
        if total is None:
            conversion.leave_out(f"{OPTIM}.lr_warmup_steps_ratio", "of an unknown number; give --optim.warmup")
        else:
            conversion.put("optim.warmup", round(share * total), f"{OPTIM}.lr_warmup_steps_ratio")
    if conversion.has(f"{OPTIM}.betas"):
        conversion.put("optim.betas", conversion.get(f"{OPTIM}.betas"), f"{OPTIM}.betas")
    rank = conversion.number("actor_rollout_ref.model.lora_rank")
    if rank:
        conversion.put("lora.rank", whole(rank), "actor_rollout_ref.model.lora_rank")
        alpha = "actor_rollout_ref.model.lora_alpha"
        conversion.put("lora.alpha", conversion.number(alpha), alpha)
        targets = conversion.words("actor_rollout_ref.model.target_modules")
        if targets and targets != ["all-linear"]:
            conversion.put("lora.targets", targets, "actor_rollout_ref.model.target_modules")
    else:
        for name in ("lora_rank", "lora_alpha", "target_modules"):
            conversion.leave_out(f"actor_rollout_ref.model.{name}", "there are no adapters (lora_rank 0)")


def _data_and_rewards(conversion: Conversion) -> None:
    longest = conversion.number("data.max_prompt_length")
    conversion.put("task.max_prompt_tokens", longest, "data.max_prompt_length")
    leaves_out, cut = conversion.get("data.filter_overlong_prompts"), str(conversion.get("data.truncation"))
    names = ("data.filter_overlong_prompts", "data.truncation")
    conversion.put("task.long_prompts", "drop" if leaves_out or cut != "error" else "raise", *names)
    if not leaves_out and cut != "error":
        conversion.differs("data.truncation", f"{cut}: longer prompts are left out and counted here, not cut")
    key = conversion.get("data.prompt_key")
    if key is not None:
        conversion.put("task.columns", {"question": key}, "data.prompt_key")
    if conversion.has("data.apply_chat_template_kwargs"):
        given = conversion.get("data.apply_chat_template_kwargs")
        conversion.put("task.chat_template_kwargs", given, "data.apply_chat_template_kwargs")
    for front in ("reward.custom_reward_function", "custom_reward_function"):
        path = conversion.get(f"{front}.path")
        if path:
            name = conversion.get(f"{front}.name") or "compute_score"
            place = path if str(path).startswith(("/", "./", "../", "~")) else f"./{path}"
            conversion.put("reward.functions", [f"verl:{place}:{name}"], f"{front}.path")
    if "reward.functions" not in conversion.ours:
        text = "verl judges by each row's data_source; without, the task's own function judges"
        conversion.to_give.append(Remark("--reward.functions", text))


def _parts(conversion: Conversion) -> None:
    if conversion.has("trainer.logger"):
        named = conversion.words("trainer.logger")
        conversion.put("track.sinks", [name for name in named if name in ("tensorboard", "wandb")], "trainer.logger")
        others = [name for name in named if name not in ("tensorboard", "wandb", "console")]
        if others:
            conversion.differs(
                "trainer.logger", f"{', '.join(others)} has no counterpart; metrics.jsonl is always written"
            )
    if conversion.has("trainer.project_name"):
        conversion.put("track.project", conversion.get("trainer.project_name"), "trainer.project_name")
    sampler = conversion.get(f"{ROLLOUT}.name")
    if sampler == "vllm":
        conversion.put("sampler.name", "vllm", f"{ROLLOUT}.name")
    elif sampler is not None:
        conversion.leave_out(f"{ROLLOUT}.name", "samplers here are transformers and vllm, or one of your own")
    buffer = "reward_model.overlong_buffer"
    if conversion.get(f"{buffer}.enable"):
        shaper = {"name": "overlong", "buffer": conversion.get(f"{buffer}.len")}
        shaper["coef"] = float(conversion.number(f"{buffer}.penalty_factor") or 1.0)
        conversion.put("shapers", [shaper], f"{buffer}.enable")
    if conversion.get("trainer.seed") is not None or conversion.has("data.seed"):
        conversion.put("train.seed", conversion.get("data.seed", "trainer.seed"), "data.seed", "trainer.seed")

"""Our config from one of TRL: the file that `trl grpo --config FILE` takes (TRL 1.16)."""

from typing import Any

from stepcredit.cli.conversion import Conversion, Remark, whole
from stepcredit.cli.others import OPTIONS
from stepcredit.errors import UserError

# Of TRL 1.16 and of the TrainingArguments below it, where they are not ours or take part in a conversion.
DEFAULTS: dict[str, Any] = {
    "num_generations": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_iterations": 1,
    "max_completion_length": 512,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "beta": 0.0,
    "epsilon": 0.2,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "importance_sampling_level": "token",
    "gradient_checkpointing": True,
    "entropy_coef": 0.0,
    "entropy_target": 0.2,
    "entropy_coef_delta": 0.005,
    "entropy_coef_max": 1.0,
    "top_entropy_quantile": 1.0,
    "save_strategy": "steps",
    "save_steps": 500,
    "eval_strategy": "no",
    "logging_steps": 10,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "dataset_train_split": "train",
    "dataset_test_split": "test",
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
}
AGGREGATES = {
    "dapo": "token_mean",
    "bnpo": "token_mean",
    "cispo": "token_mean",
    "grpo": "seq_mean_token_mean",
    "dr_grpo": "sum_over_constant",
}
CREDITS = {"group": "grpo", "True": "grpo", "none": "dr_grpo", "False": "dr_grpo", "batch": "reinforce_pp_baseline"}
SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
OPTIMISERS = ("adamw_torch", "adamw_torch_fused", "adamw")
REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
BUDGET = "how a step is cut changes nothing here; see --optim.max-tokens-per-micro-batch"
KNOWN = {
    "per_device_train_batch_size": BUDGET,
    "logging_steps": "every iteration is logged",
    "logging_strategy": "every iteration is logged",
    "logging_first_step": "every iteration is logged",
    "resume_from_checkpoint": "give --resume to stepcredit train",
    "log_completions": "see --rollouts.show and --rollouts.every",
    "per_device_eval_batch_size": "how an evaluation is cut changes nothing here",
    "attn_implementation": "the package has attention of its own",
    "use_liger_kernel": "the package has kernels of its own",
    "dtype": "weights are always fp32 here; --train.dtype is that of the computation",
    "torch_dtype": "weights are always fp32 here; --train.dtype is that of the computation",
    "dataset_config": "name the files of that configuration with --data",
    "env": "set these variables where the run starts",
    "deepspeed": "see --distributed.strategy",
    "fsdp": "see --distributed.strategy",
    "max_tool_calling_iterations": "the package has no tools",
    "vllm_server_base_url": "see --sampler.server and docs/vllm.md",
    "vllm_server_host": "see --sampler.server and docs/vllm.md",
    "vllm_server_port": "see --sampler.server and docs/vllm.md",
}


def from_trl(conversion: Conversion, processes: int) -> None:
    """Write our options.

    Args:
        conversion: of a flat file.
        processes: of the run, which TRL multiplies its batch with.

    Raises:
        UserError: values that TRL would refuse, too, or that are of another type.
    """
    for name in list(conversion.given):
        if isinstance(conversion.given[name], dict) and name not in ("env", "chat_template_kwargs"):
            conversion.leave_out(name)
    conversion.take_table(OPTIONS)
    conversion.put("optim.learning_rate", conversion.number("learning_rate"), "learning_rate")
    conversion.put("sampler.temperature", conversion.number("temperature"), "temperature")
    for name, path in (
        ("seed", "train.seed"),
        ("trust_remote_code", "trust_remote_code"),
        ("save_total_limit", "checkpoint.keep"),
        ("chat_template_kwargs", "task.chat_template_kwargs"),
    ):
        if conversion.has(name):
            conversion.put(path, conversion.get(name), name)
    _algorithm(conversion)
    _loss(conversion)
    steps = _batches(conversion, processes)
    _lengths(conversion, steps)
    _optimiser(conversion, steps)
    _entropy(conversion)
    _data_and_rewards(conversion)
    _parts(conversion)
    conversion.leave_out_rest(KNOWN)


def _algorithm(conversion: Conversion) -> None:
    scale, kind = str(conversion.get("scale_rewards")), str(conversion.get("loss_type"))
    credit = CREDITS.get(scale)
    if credit is None:
        raise UserError(f"TRL's scale_rewards: '{scale}' is none of group, batch, none")
    names = ("scale_rewards", "loss_type")
    conversion.put("algorithm", "dr_grpo" if (credit, kind) == ("dr_grpo", "dr_grpo") else "grpo", *names)
    conversion.put("credit.name", credit, "scale_rewards")
    if credit == "grpo":
        conversion.differs("scale_rewards", "the std of a group has 1e-6 added here, 1e-4 in TRL")
    if credit == "reinforce_pp_baseline":
        conversion.differs("scale_rewards", "batch: here the std is that of the returns less their group's mean")
    if conversion.get("multi_objective_aggregation") not in (None, "sum_then_normalize"):
        conversion.leave_out("multi_objective_aggregation", "rewards are summed with their weights first")


def _loss(conversion: Conversion) -> None:
    kind, level = str(conversion.get("loss_type")), str(conversion.get("importance_sampling_level"))
    if kind in AGGREGATES:
        conversion.put("objective.aggregate", AGGREGATES[kind], "loss_type")
    else:
        conversion.leave_out("loss_type", "no such loss; the clipped one is written in its place")
    if kind == "bnpo":
        conversion.differs("loss_type", "bnpo: the mean is over the tokens of a step, not of each micro-batch")
    if kind in ("grpo", "dr_grpo"):
        conversion.differs("loss_type", f"{kind}: denominators are of a step, not the mean of those of micro-batches")
    loss = "cispo" if kind == "cispo" else "gspo" if level == "sequence" else "clip"
    conversion.put("loss.name", loss, "loss_type", "importance_sampling_level")
    if level not in ("token", "sequence"):
        conversion.leave_out("importance_sampling_level")
    low, high = conversion.number("epsilon"), conversion.number("epsilon_high")
    if loss == "cispo":
        _cispo_bounds(conversion, high)
    else:
        conversion.put("loss.clip_low", low, "epsilon")
        conversion.put("loss.clip_high", low if high is None else high, "epsilon", "epsilon_high")
    if loss != "clip" and conversion.take_back("loss.dual_clip"):
        conversion.leave_out("delta", f"the loss {loss} has no dual clip")
    coef = conversion.number("beta") or 0.0
    conversion.put("objective.kl.coef", coef, "beta")
    if coef:
        conversion.put("objective.kl.estimator", "k3", "beta")
        if conversion.get("use_bias_correction_kl") is not False:
            conversion.differs("beta", "TRL multiplies the KL term by the ratio; the same at one step a batch")
    elif conversion.has("use_bias_correction_kl"):
        conversion.leave_out("use_bias_correction_kl", "there is no KL term")


def _cispo_bounds(conversion: Conversion, high: float | None) -> None:
    if high is not None:
        conversion.put("loss.clip_high", high - 1, "epsilon_high")
        conversion.differs("epsilon_high", "with cispo it is the largest ratio; here the distance from 1")
    else:
        low = conversion.number("epsilon")
        conversion.differs("loss_type", f"cispo: ratios are at most 5 here, and without epsilon_high {low:g} in TRL")
    conversion.leave_out("epsilon", "cispo has no lower bound in TRL")


def _batches(conversion: Conversion, processes: int) -> int:
    """Problems of an iteration and optimiser steps on them; returns the optimiser steps of an iteration.

    TRL samples `generation_batch_size` completions at once, which are taken in `steps_per_generation` micro-batches;
    `gradient_accumulation_steps` of these are an optimiser step.
    """
    rows = whole(conversion.number("per_device_train_batch_size") or 1) * processes
    accumulated = whole(conversion.number("gradient_accumulation_steps") or 1)
    size, taken = conversion.number("generation_batch_size"), conversion.number("steps_per_generation")
    if size and taken:
        raise UserError("TRL's generation_batch_size and steps_per_generation: TRL takes one of the two")
    if size and size % rows:
        raise UserError(f"TRL's generation_batch_size: {size:g} is no multiple of the {rows} rows of a micro-batch")
    parts = whole(size / rows) if size else whole(taken or accumulated)
    completions, group = rows * parts, conversion.ours["growth.group_size"]
    if completions % group:
        raise UserError(
            f"TRL's num_generations: {completions} completions of a generation batch are no multiple of {group}; with "
            f"several processes give --processes ({processes} was taken)"
        )
    names = (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size"),
        *("steps_per_generation", "num_generations"),
    )
    together = whole(accumulated / parts) if accumulated > parts else 1
    if accumulated % parts and parts % accumulated:
        conversion.differs(
            "steps_per_generation", f"{parts} micro-batches are no multiple of the {accumulated} of a step"
        )
    conversion.put("train.problems_per_iteration", completions // group * together, *names)
    steps = whole(parts / accumulated) if parts > accumulated else 1
    conversion.put("optim.num_minibatches", steps, "gradient_accumulation_steps", "steps_per_generation")
    text = f"{completions * together} completions of {processes} process{'es' * (processes > 1)} are an iteration"
    conversion.differs("per_device_train_batch_size", f"{text}; tell another number of processes by --processes")
    return steps * int(conversion.ours["optim.num_epochs"])


def _lengths(conversion: Conversion, steps: int) -> None:
    """What TRL counts in optimiser steps, and we in iterations."""
    most = conversion.number("max_steps")
    if most is not None and most > 0:
        conversion.put("train.iterations", whole(most / steps), "max_steps")
        conversion.leave_out("num_train_epochs", "max_steps says how long")
        _told(conversion, "max_steps", most, steps)
    else:
        epochs = conversion.number("num_train_epochs")
        text = f"TRL passes {epochs:g} times over the problems: passes x problems / train.problems_per_iteration"
        conversion.to_give.append(Remark("--iterations", text))
    saves = conversion.get("save_strategy")
    every = conversion.number("save_steps")
    if saves == "no":
        conversion.put("checkpoint.every", 0, "save_strategy")
    elif saves == "steps" and every is not None and every >= 1:
        conversion.put("checkpoint.every", whole(every / steps), "save_steps", "save_strategy")
        _told(conversion, "save_steps", every, steps)
    else:
        conversion.leave_out("save_strategy", "checkpoints are written every so many iterations: --save-every")
        conversion.leave_out("save_steps", "checkpoints are written every so many iterations: --save-every")
    evaluates, every = conversion.get("eval_strategy"), conversion.number("eval_steps") or 0
    if evaluates == "steps":
        every = every or conversion.number("logging_steps") or 0
    if evaluates == "steps" and every >= 1:
        conversion.put("eval.every", whole(every / steps), "eval_steps", "eval_strategy")
        _told(conversion, "eval_steps", every, steps)
    elif evaluates != "no":
        conversion.leave_out("eval_strategy", "evaluations are every so many iterations: --eval-every")
    elif conversion.has("eval_steps"):
        conversion.leave_out("eval_steps", "eval_strategy is no")


def _told(conversion: Conversion, name: str, value: float, steps: int) -> None:
    if steps > 1 and conversion.has(name):
        conversion.differs(name, f"{value:g} optimiser steps, {steps} in an iteration")


def _optimiser(conversion: Conversion, steps: int) -> None:
    schedule = str(conversion.get("lr_scheduler_type"))
    if schedule in SCHEDULES:
        conversion.put("optim.schedule", SCHEDULES[schedule], "lr_scheduler_type")
    else:
        conversion.leave_out("lr_scheduler_type", "the rate stays constant")
    warmup, ratio = conversion.number("warmup_steps") or 0, conversion.number("warmup_ratio") or 0
    if 0 < warmup < 1 or (ratio and not warmup):  # a share of all steps
        share, total = warmup or ratio, conversion.ours.get("train.iterations")
        name = "warmup_steps" if warmup else "warmup_ratio"
        if total is None:
            conversion.leave_out(name, "a share of an unknown number of iterations; give --optim.warmup")
        else:
            conversion.put("optim.warmup", round(share * total), name)
    elif warmup:
        conversion.put("optim.warmup", whole(warmup / steps), "warmup_steps")
    if conversion.ours.get("optim.warmup"):
        conversion.differs("warmup_steps", "the first iteration has a rate above 0 here, and TRL's first step has 0")
    betas = [conversion.number("adam_beta1"), conversion.number("adam_beta2")]
    conversion.put("optim.betas", betas, "adam_beta1", "adam_beta2")
    if conversion.has("optim") and conversion.get("optim") not in OPTIMISERS:
        conversion.leave_out("optim", "AdamW is the optimiser here")
    if conversion.has("bf16") or conversion.has("fp16"):
        if conversion.get("fp16"):
            conversion.leave_out("fp16", "the computation is in bfloat16 or float32 here")
            conversion.get("bf16")
        else:
            conversion.put("train.dtype", "bfloat16" if conversion.get("bf16") else "float32", "bf16", "fp16")
    if conversion.get("use_peft"):
        conversion.put("lora.rank", conversion.get("lora_r"), "lora_r")
        conversion.put("lora.alpha", conversion.get("lora_alpha"), "lora_alpha")
        targets = conversion.words("lora_target_modules")
        if targets and targets != ["all-linear"]:
            conversion.put("lora.targets", targets, "lora_target_modules")
        if conversion.get("lora_dropout"):
            conversion.differs("lora_dropout", f"{conversion.get('lora_dropout')}: adapters have no dropout here")
    else:
        for name in [name for name in conversion.given if name.startswith("lora_")]:
            conversion.leave_out(name, "use_peft is off")


def _entropy(conversion: Conversion) -> None:
    conversion.put("objective.entropy_top", conversion.number("top_entropy_quantile"), "top_entropy_quantile")
    if conversion.get("use_adaptive_entropy"):
        for name, path in (
            ("entropy_target", "objective.entropy_target"),
            ("entropy_coef_delta", "objective.entropy_step"),
            ("entropy_coef_max", "objective.entropy_coef_max"),
        ):
            conversion.put(path, conversion.number(name), name)
        conversion.differs("use_adaptive_entropy", "the coefficient changes once an iteration, not once a step")


def _data_and_rewards(conversion: Conversion) -> None:
    for name, path in (("dataset_train_split", "task.split"), ("dataset_test_split", "task.eval_split")):
        conversion.put(path, conversion.get(name), name)
    longest = conversion.number("max_prompt_length")
    if longest is not None:
        conversion.put("task.max_prompt_tokens", longest, "max_prompt_length")
        conversion.differs(
            "max_prompt_length", "longer prompts are left out here; they were cut in versions of TRL that had it"
        )
    else:
        conversion.differs(
            "task.max_prompt_tokens", "1024 here, and longer prompts are left out and counted; TRL takes all"
        )
    if conversion.has("system_prompt"):
        conversion.put("task.system_prompt", conversion.get("system_prompt"), "system_prompt")
    named = conversion.words("reward_funcs")
    if not named:
        conversion.to_give.append(Remark("--reward.functions", "the file names none; without, the task's own judges"))
        return
    unknown = [name for name in named if "." not in name and name not in REWARDS]
    if unknown:
        conversion.leave_out("reward_funcs", f"{', '.join(unknown)} has no counterpart; see docs/judging.md")
    kept = [f"trl.rewards.{name}" if name in REWARDS else name for name in named if name not in unknown]
    if kept:
        conversion.put("reward.functions", kept, "reward_funcs")
    if any(name.startswith("trl.") for name in kept):
        conversion.differs("reward_funcs", "TRL's own functions are called where TRL is installed")


def _parts(conversion: Conversion) -> None:
    if conversion.get("mask_truncated_completions"):
        conversion.put("shapers", ["mask_truncated"], "mask_truncated_completions")
    if conversion.has("report_to"):
        named = conversion.words("report_to")
        conversion.put("track.sinks", [name for name in named if name in ("tensorboard", "wandb")], "report_to")
        others = [name for name in named if name not in ("tensorboard", "wandb", "none")]
        if others:
            conversion.differs("report_to", f"{', '.join(others)} has no counterpart; metrics.jsonl is always written")
    if not conversion.get("use_vllm"):
        for name in [name for name in conversion.given if name.startswith("vllm_")]:
            conversion.leave_out(name, "use_vllm is off")
        return
    conversion.put("sampler.name", "vllm", "use_vllm")
    if conversion.get("vllm_importance_sampling_correction"):
        mode, cap = str(conversion.get("vllm_importance_sampling_mode")), "vllm_importance_sampling_clip_max"
        kind = "sequence" if mode.startswith("sequence") else "token"
        conversion.put("objective.importance", kind, "vllm_importance_sampling_mode")
        conversion.put("objective.importance_cap", conversion.number(cap, "vllm_importance_sampling_cap"), cap)
        if mode.endswith("mask"):
            text = f"{mode}: weights above the bound are cut to it; TRL leaves such {kind}s out"
            conversion.differs("vllm_importance_sampling_mode", text)

"""From the config to the parts that it names; whatever does not fit fails here, before a token is sampled."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from stepcredit.auxiliary import AuxModel, OldPolicy, Reference
from stepcredit.config import Config, CreditConfig
from stepcredit.credit import CREDIT, CreditFunction, assign, check_options, needs_of
from stepcredit.errors import UserError, did_you_mean
from stepcredit.forest import Forest
from stepcredit.imports import by_name
from stepcredit.judging import Judge
from stepcredit.objective import Objective, Unit
from stepcredit.policy.forward import Policy
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler
from stepcredit.shaping import SHAPERS, Shaper
from stepcredit.tasks.base import Task
from stepcredit.tasks.prompts import PromptFormat
from stepcredit.types import Problem
from stepcredit.verifiers import Reward, reward_function
from stepcredit.verifiers.workers import Workers


@dataclass(frozen=True)
class Parts:
    """Everything that a config names and that needs no model."""

    task: Task
    rewards: dict[str, Reward]
    reward_weights: list[float]
    params: SamplingParams
    shapers: list[Shaper]
    credit: CreditFunction
    assign: Callable[[Forest], Forest]
    objective: Objective


@dataclass(frozen=True)
class Rollouts:
    """What sampling and judging take, for training and for looking alike."""

    task: Task
    encode: PromptFormat
    sampler: TransformersSampler
    params: SamplingParams
    judge: Judge


def build_parts(config: Config) -> Parts:
    """Everything but the model."""
    shapers = [by_name("shapers", name, SHAPERS) for name in config.shapers]
    credit, assign_credit = build_credit(config.credit)
    objective = build_objective(config, "completion" if needs_of(credit).forests == "flat" else "segment")
    task = build_task(config)
    rewards, weights = build_rewards(config, task)
    return Parts(task, rewards, weights, build_params(config), shapers, credit, assign_credit, objective)


def build_rollouts(config: Config, parts: Parts, policy: Policy) -> Rollouts:
    """The parts that sampling and judging need, bound to a model."""
    given = config.task
    encode = PromptFormat(
        policy.tokenizer,
        given.system_prompt,
        given.max_prompt_tokens,
        given.chat_template_kwargs,
        given.prompt_template,
    )
    judge = build_judge(config, parts.rewards, parts.reward_weights, policy.tokenizer)
    judge.start()  # while the prompts are checked
    parts.task.fit(encode, given.long_prompts)
    return Rollouts(parts.task, encode, TransformersSampler(policy, config.sampler.max_rows), parts.params, judge)


def build_rewards(config: Config, task: Task) -> tuple[dict[str, Reward], list[float]]:
    """The reward functions, those of the task where none are named, and their weights."""
    given = config.reward
    names = given.functions or list(task.reward_functions)
    if len(set(names)) < len(names):
        raise UserError(f"reward.functions: one of {', '.join(names)} is named twice")
    weights = given.weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise UserError(f"reward.weights: {len(weights)} weights for {len(names)} functions ({', '.join(names)})")
    if unknown := given.options.keys() - set(names):
        raise UserError(f"reward.options.{min(unknown)}: no such reward function; {did_you_mean(min(unknown), names)}")
    longest = config.sampler.max_new_tokens
    defaults = {"overlong": {"max_tokens": longest, "buffer": max(1, longest // 5)}}
    return {
        name: reward_function(name, defaults.get(name, {}) | given.options.get(name, {})) for name in names
    }, weights


def build_judge(
    config: Config, rewards: dict[str, Reward], weights: list[float], tokenizer: PreTrainedTokenizerBase | None
) -> Judge:
    given = config.reward
    workers = Workers(given.timeout_s, given.workers, given.memory_mb)
    return Judge(rewards, weights, tokenizer, workers, given.on_failure, given.call_with)


def build_task(config: Config) -> Task:
    """The embedded task, or a data set with a held-out part."""
    given, seed = config.task, config.train.seed
    if given.data == "embedded":
        if given.columns or given.eval_data:
            raise UserError("task.columns and task.eval_data belong to a data file; name it with --data")
        from stepcredit.tasks.embedded import EmbeddedTask

        return EmbeddedTask(seed)
    from stepcredit.tasks.dataset import DatasetTask, load_problems, split_held_out

    train = load_rows(config)
    if given.eval_data:
        held_out = load_problems(given.eval_data, given.eval_split, given.columns, _needs_answer(config))
    else:
        train, held_out = split_held_out(train, given.held_out, seed=0)
    return DatasetTask(given.data, train, held_out, seed)


def load_rows(config: Config) -> list[Problem]:
    """The problems of `task.data`, a data set."""
    from stepcredit.tasks.dataset import load_problems

    given = config.task
    return load_problems(given.data, given.split, given.columns, _needs_answer(config))


def _needs_answer(config: Config) -> bool | None:
    """Whether a reward function that is named needs answers; None when none is named."""
    named = [reward_function(name) for name in config.reward.functions]
    return any(reward.needs_answer for reward in named) if named else None


def build_params(config: Config) -> SamplingParams:
    given = config.sampler
    stop = None if given.stop_token_ids is None else tuple(given.stop_token_ids)
    return SamplingParams(given.temperature, given.top_p, given.top_k, given.max_new_tokens, stop)


def build_credit(config: CreditConfig) -> tuple[CreditFunction, Callable[[Forest], Forest]]:
    """The credit function, and the step that adds its advantages to a forest."""
    function = by_name("credit.name", config.name, CREDIT)
    check_options(config.name, function, config.options)
    return function, partial(assign, name=config.name, function=function, options=config.options)


def build_objective(config: Config, unit: Unit | None = None) -> Objective:
    """The objective; `unit` is what its weights count as one sequence."""
    given = config.objective
    if given.dual_clip and given.dual_clip <= 1:
        raise UserError(f"objective.dual_clip must be above 1 (or 0 for none), got {given.dual_clip}")
    return Objective(
        surrogate=given.surrogate,
        clip_low=given.clip_low,
        clip_high=given.clip_high,
        dual_clip=given.dual_clip,
        aggregate=given.aggregate,
        kl_estimator=given.kl.estimator,
        kl_coef=given.kl.coef,
        entropy_coef=given.entropy_coef,
        constant=float(config.sampler.max_new_tokens),
        unit=unit,
    )


def build_models(config: Config, parts: Parts, policy: Policy) -> dict[str, AuxModel]:
    """The models whose columns the credit function and the objective read, by column, in the order they observe."""
    optim, objective = config.optim, parts.objective
    needed = set(needs_of(parts.credit).columns)
    if objective.needs_reference:
        needed.add("ref_logprobs")
    if objective.kl_in_reward or optim.num_epochs * optim.num_minibatches > 1:
        needed.add("old_logprobs")
    makers: dict[str, Callable[[Policy, float, int], AuxModel]] = {"old_logprobs": OldPolicy, "ref_logprobs": Reference}
    if unknown := needed - makers.keys() - {"rollout_logprobs", "entropy", "token_rewards"}:
        raise UserError(
            f"credit '{config.credit.name}' needs {', '.join(sorted(unknown))}, which nothing here provides"
        )
    budget = optim.max_tokens_per_micro_batch
    chosen = {column: maker for column, maker in makers.items() if column in needed}
    return {column: maker(policy, config.sampler.temperature, budget) for column, maker in chosen.items()}

"""From the config to the parts that it names; whatever does not fit fails here, before a token is sampled."""

from collections.abc import Callable
from dataclasses import dataclass

from stepcredit.config import Config
from stepcredit.credit import CREDIT, CreditFunction, needs_of
from stepcredit.credit.choose import build_credit
from stepcredit.errors import UserError
from stepcredit.estimators.base import Context, Estimator
from stepcredit.estimators.reads import run_observers
from stepcredit.estimators.table import Observers
from stepcredit.forest import Forest
from stepcredit.growth.recorded import Recorded
from stepcredit.growth.rollouts import Rollouts
from stepcredit.growth.table import build_growth
from stepcredit.learn.placement import UNSHARDED, Placement
from stepcredit.losses.choose import build_objective
from stepcredit.losses.objective import Objective
from stepcredit.plan.memory import fits_whole
from stepcredit.policy.forward import Policy
from stepcredit.policy.limits import PromptCheck, check_stop_tokens
from stepcredit.policy.loading import pick_device
from stepcredit.processes.ranks import Ranks
from stepcredit.run.checks import check_combination, check_recorded
from stepcredit.run.servers import fit_server
from stepcredit.run.windowed import check_window
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.table import build_sampler
from stepcredit.shaping.base import Shaper
from stepcredit.shaping.choose import build_shapers, check_shapers, warn_of_filter
from stepcredit.tasks.base import Task
from stepcredit.tasks.mixture import build_data
from stepcredit.tasks.prompts import PromptFormat
from stepcredit.tasks.rewards import build_judge, build_rewards
from stepcredit.verifiers.reward import Reward


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
    observers: Observers


def build_parts(config: Config) -> Parts:
    """Everything but the models.

    Raises:
        UserError: an option names something that there is not, or options do not go together.
    """
    shapers = build_shapers(config)
    credit, assign = build_credit(config.credit)
    flat = needs_of(credit).forests == "flat"
    fitting = ", ".join(name for name, function in CREDIT.items() if needs_of(function).forests == "tree")
    who = needs_of(credit).flat or f"credit '{config.credit.name}'"
    config.growth.check(flat, who, fitting, len(config.objective.depth_weights))
    config.filter.check()
    config.ptx.check()
    objective = build_objective(config, flat)
    check_combination(config, credit, objective)
    check_window(config, credit, objective)
    seen = run_observers(config, credit, objective, shapers)
    check_recorded(config, seen.needed)
    task = build_task(config)
    rewards, weights = ({}, []) if config.growth.recorded else build_rewards(config, task)
    check_shapers(shapers, dict(zip(rewards, weights, strict=True)))
    warn_of_filter(config)
    return Parts(task, rewards, weights, config.sampler, shapers, credit, assign, objective, seen)


def build_rollouts(config: Config, parts: Parts, policy: Policy, placement: Placement = UNSHARDED) -> Rollouts:
    """The parts that sampling and judging need, bound to a model that is still whole."""
    given = config.task
    check = PromptCheck(policy, config.sampler.max_new_tokens)
    encode = PromptFormat(
        policy.tokenizer,
        given.system_prompt,
        given.max_prompt_tokens,
        given.chat_template_kwargs,
        given.prompt_template,
        given.chat_template,
        check,
    )
    ranks = placement.ranks
    judge = build_judge(config, parts.rewards, parts.reward_weights, policy.tokenizer, ranks.local_size)
    judge.start()  # while the prompts are checked
    stop = policy.stop_token_ids if parts.params.stop_token_ids is None else parts.params.stop_token_ids
    grow = build_growth(config, parts.task, encode, stop)
    parts.task.fit(grow.prompt if isinstance(grow, Recorded) else encode, given.long_prompts)
    sampler = build_sampler(fit_server(config, placement, policy.device), policy, placement)
    check_stop_tokens(
        sampler.stop_token_ids if parts.params.stop_token_ids is None else parts.params.stop_token_ids,
        policy.vocabulary,
    )
    return Rollouts(parts.task, encode, sampler, grow, parts.params, judge, ranks, config.growth.recorded)


def build_estimators(
    config: Config, parts: Parts, policy: Policy, rollouts: Rollouts | None = None, placement: Placement = UNSHARDED
) -> dict[str, Estimator]:
    """What adds the columns that credit and objective read, in the order in which they observe.

    The policy is still whole; copies of it are placed here.
    """
    return parts.observers.build(Context(config, policy, parts.observers.needed, rollouts, placement))


def build_task(config: Config) -> Task:
    """The embedded task, or what `task.data` names, with a held-out part."""
    given = config.task
    if given.data == "embedded":
        if config.growth.recorded:
            raise UserError(
                f"task.data: the embedded task has no {config.growth.name}; name a file that has: --data FILE"
            )
        if given.columns or given.eval_data or given.weights or given.gym:
            raise UserError(
                "task.columns, eval_data, weights and gym belong to data of your own; name them with --data"
            )
        from stepcredit.demo.task import EmbeddedTask

        return EmbeddedTask(config.train.seed)
    return build_data(config)


def build_placement(config: Config, ranks: Ranks) -> Placement:
    """How models lie on the processes.

    A config may ask for shards and still run on one process: without torchrun there is nothing to shard.

    Raises:
        UserError: offload is asked for without shards.
    """
    given = config.distributed
    if given.cpu_offload and given.strategy != "fsdp":
        raise UserError("distributed.cpu_offload goes with --distributed.strategy fsdp")
    if not ranks.distributed:
        return UNSHARDED
    device = pick_device(config.train.device)
    strategy = given.strategy
    if strategy == "auto":
        strategy = "ddp" if fits_whole(config, device) else "fsdp"
    return Placement(ranks, strategy, given.cpu_offload, device)

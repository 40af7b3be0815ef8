"""From the config to the parts that it names; whatever does not fit fails here, before a token is sampled."""

import inspect
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from stepcredit.config import Config, CreditConfig
from stepcredit.credit import CREDIT, CreditFunction, assign, check_options, needs_of
from stepcredit.credit.base import Needs
from stepcredit.errors import UserError
from stepcredit.estimators.base import AuxModel
from stepcredit.estimators.frozen import Base, OldPolicy, Reference, SameAsOld
from stepcredit.estimators.prm import BETA, ImplicitPRM
from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.growth.base import Growth
from stepcredit.growth.flat import flat
from stepcredit.growth.steps import step_rule
from stepcredit.growth.tree import TreeShape, tree
from stepcredit.imports import by_name
from stepcredit.learn.adapters import add_adapters, has_adapters
from stepcredit.learn.placement import WHOLE, Placement
from stepcredit.losses.objective import Objective
from stepcredit.plan.memory import fits_whole
from stepcredit.policy.forward import Policy
from stepcredit.policy.loading import load_policy, pick_device, source_of
from stepcredit.processes.ranks import ALONE, Ranks
from stepcredit.run.collecting import Window
from stepcredit.samplers.base import Sampler
from stepcredit.samplers.params import SamplingParams
from stepcredit.samplers.transformers import TransformersSampler
from stepcredit.shaping.shapers import SHAPERS, Shaper
from stepcredit.tasks.base import Task
from stepcredit.tasks.prompts import PromptFormat
from stepcredit.verifiers import Reward
from stepcredit.verifiers.judging import Judge
from stepcredit.verifiers.rewards import build_judge, build_rewards, load_rows

log = logging.getLogger("stepcredit")


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
    sampler: Sampler
    grow: Growth
    params: SamplingParams
    judge: Judge
    ranks: Ranks = ALONE


def build_parts(config: Config) -> Parts:
    """Everything but the model."""
    shapers = [by_name("shapers", name, SHAPERS) for name in config.shapers]
    credit, assign_credit = build_credit(config.credit)
    _check_growth(config, credit)
    objective = build_objective(config, credit)
    task = build_task(config)
    rewards, weights = build_rewards(config, task)
    return Parts(task, rewards, weights, build_params(config), shapers, credit, assign_credit, objective)


def build_rollouts(config: Config, parts: Parts, policy: Policy, placement: Placement = WHOLE) -> Rollouts:
    """The parts that sampling and judging need, bound to a model that is still whole."""
    given = config.task
    encode = PromptFormat(
        policy.tokenizer,
        given.system_prompt,
        given.max_prompt_tokens,
        given.chat_template_kwargs,
        given.prompt_template,
        given.chat_template,
    )
    judge = build_judge(config, parts.rewards, parts.reward_weights, policy.tokenizer, placement.ranks.local_size)
    judge.start()  # while the prompts are checked
    parts.task.fit(encode, given.long_prompts)
    sampler = build_sampler(config, policy, placement)
    grow = build_growth(config, parts.task, policy)
    return Rollouts(parts.task, encode, sampler, grow, parts.params, judge, placement.ranks)


def build_sampler(config: Config, policy: Policy, placement: Placement) -> Sampler:
    """The sampler, with the weights of a policy that is still whole."""
    given = config.sampler
    if given.name == "transformers":
        return TransformersSampler(placement.sampling_copy(policy), given.max_rows, keep_mb=given.keep_mb)
    from stepcredit.samplers.remote.launch import LocalServer, lora_args
    from stepcredit.samplers.remote.vllm import VLLMSampler

    if bool(given.vllm.servers) == given.vllm.launch:
        raise UserError(
            "sampler.name vllm needs running servers (--sampler.vllm.servers http://HOST:PORT,...) or one of its own "
            "(--sampler.vllm.launch true), not both"
        )
    server: LocalServer | None = None
    urls, options = list(given.vllm.servers), given.vllm
    if options.launch:
        started: list[LocalServer] = []

        def start() -> str:
            processed = given.temperature not in (0.0, 1.0) and given.top_p == 1 and given.top_k == 0
            file = Path(tempfile.gettempdir()) / f"stepcredit-vllm-{os.getpid()}.log"
            model, dtype = source_of(config.model), dtype_of(policy)
            args = [*lora_args(config.lora.rank), *options.args]
            started.append(LocalServer(model, options.python, options.port, dtype, processed, args, file))
            return started[0].url

        urls = [placement.ranks.first(start)]
        server = started[0] if started else None
    folder = Path(options.folder) if options.folder else None
    return VLLMSampler(
        policy,
        urls,
        given.max_rows,
        options.timeout_s,
        options.patience_s,
        folder,
        placement.ranks,
        server,
        options.transfer,
        placement.device if placement.sharded else None,
    )


def dtype_of(policy: Policy) -> str:
    """The type that a policy computes in, as vLLM names it."""
    return str(policy.autocast or torch.float32).removeprefix("torch.")


def build_growth(config: Config, task: Task, policy: Policy) -> Growth:
    """How training forests are grown."""
    given = config.growth
    if given.name == "flat":
        return partial(flat, group_size=given.group_size)
    rule = step_rule(given.step.tokens, given.step.delimiters, policy.tokenizer, task.step_delimiters)
    shape = TreeShape(given.num_branches, given.depth, rule, given.mode, given.max_segments, given.max_tokens)
    shape.check(config.sampler.max_new_tokens)
    return partial(tree, shape=shape)


def build_task(config: Config) -> Task:
    """The embedded task, or a data set with a held-out part."""
    given, seed = config.task, config.train.seed
    if given.data == "embedded":
        if given.columns or given.eval_data:
            raise UserError("task.columns and task.eval_data belong to a data file; name it with --data")
        from stepcredit.demo.task import EmbeddedTask

        return EmbeddedTask(seed)
    from stepcredit.tasks.dataset import DatasetTask, split_held_out

    train = load_rows(config)
    if given.eval_data:
        held_out = load_rows(config, given.eval_data, given.eval_split)
    else:
        train, held_out = split_held_out(train, given.held_out, seed=0)
    return DatasetTask(given.data, train, held_out, seed)


def _check_growth(config: Config, credit: CreditFunction) -> None:
    """Refuse what does not go together."""
    given, default = config.growth, type(config.growth)()
    trees = given.name == "tree"
    if trees and needs_of(credit).forests == "flat":
        fitting = ", ".join(name for name, function in CREDIT.items() if needs_of(function).forests == "tree")
        raise UserError(
            f"credit '{config.credit.name}' takes flat forests, growth.name is tree; take --growth.name flat, or a "
            f"credit for trees ({fitting})"
        )
    if trees and given.group_size != default.group_size:
        raise UserError("growth.group_size is of flat growth; trees have --growth.num-branches and --growth.depth")
    if not trees:
        for name in ("num_branches", "depth", "step", "mode", "max_segments", "max_tokens"):
            if getattr(given, name) != getattr(default, name):
                raise UserError(f"growth.{name} is of trees; set --growth.name tree, or an algorithm such as treerpo")
    if trees and config.objective.depth_weights and len(config.objective.depth_weights) != given.depth:
        raise UserError(
            f"objective.depth_weights: {len(config.objective.depth_weights)} numbers for {given.depth} depths; give "
            "one for each, from the prompt down"
        )


def build_params(config: Config) -> SamplingParams:
    given = config.sampler
    stop = None if given.stop_token_ids is None else tuple(given.stop_token_ids)
    return SamplingParams(given.temperature, given.top_p, given.top_k, given.max_new_tokens, stop)


def build_credit(config: CreditConfig) -> tuple[CreditFunction, Callable[[Forest], Forest]]:
    """The credit function, and the step that adds its advantages to a forest.

    The function is called once, so that what it says of its options is said now.
    """
    function = by_name("credit.name", config.name, CREDIT)
    check_options(config.name, function, config.options)
    try:
        with torch.no_grad():
            function(_tiny_forest(needs_of(function)), **config.options)
    except UserError:
        raise
    except Exception as error:  # it may rely on what only real rollouts have
        log.debug("credit '%s' failed on made-up rollouts (%s)", config.name, error)
    return function, partial(assign, name=config.name, function=function, options=config.options)


def _tiny_forest(needs: Needs) -> Forest:
    """Two groups with right and wrong completions, and the columns that a credit function needs, all 0."""
    ends = [Segment([1, 2, 3], reward=1.0), Segment([4, 5], reward=0.0)]
    if needs.forests == "tree":
        steps = [Segment([6], finish="cut"), Segment([7, 8], finish="cut")]
        ends = steps + [replace(end, parent=parent) for parent in range(2) for end in ends]
    forest = Forest.from_trees([Tree(Problem(id=f"made-up-{number}"), [1, 2], ends) for number in range(2)])
    return forest.with_token(**{name: torch.zeros(forest.num_tokens) for name in needs.columns})


def build_objective(config: Config, credit: CreditFunction) -> Objective:
    """The objective; a credit for trees is weighed by segments, any other by completions."""
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
        unit="completion" if needs_of(credit).forests == "flat" else "segment",
        depth_weights=tuple(given.depth_weights),
        importance=given.importance,
        importance_cap=given.importance_cap,
    )


def build_models(config: Config, parts: Parts, policy: Policy, placement: Placement = WHOLE) -> dict[str, AuxModel]:
    """The models whose columns the credit function and the objective read, by column, in the order they observe.

    The policy is still whole; copies of it are spread here.
    """
    optim, objective = config.optim, parts.objective
    needed = set(needs_of(parts.credit).columns)
    if objective.needs_reference:
        needed.add("ref_logprobs")
    elsewhere = config.sampler.name != "transformers"  # its log-probabilities are not to the last bit the trainer's
    if objective.kl_in_reward or objective.importance != "none" or elsewhere:
        needed.add("old_logprobs")
    if optim.num_epochs * optim.num_minibatches > 1:
        needed.add("old_logprobs")
    provided = {"old_logprobs", "ref_logprobs", "prm_logprobs", "rollout_logprobs", "entropy", "token_rewards"}
    if unknown := needed - provided:
        raise UserError(
            f"credit '{config.credit.name}' needs {', '.join(sorted(unknown))}, which nothing here provides"
        )
    temperature, budget = config.sampler.temperature, optim.max_tokens_per_micro_batch
    with_prm = "prm_logprobs" in needed
    if with_prm:
        _check_prm(config, objective)
        needed.add("ref_logprobs")
    own = with_prm and config.prm.reference == "policy"
    models: dict[str, AuxModel] = {}
    if "old_logprobs" in needed or own:
        models["old_logprobs"] = OldPolicy(policy, temperature, budget)
    start = policy
    if with_prm and config.prm.model is not None:
        start = load_model(config, config.prm.model, placement)
        if start.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise UserError(f"prm.model: '{config.prm.model}' has another vocabulary than the policy")
    if own:
        models["ref_logprobs"] = SameAsOld()
    elif "ref_logprobs" in needed:
        kind = Base if start is policy and has_adapters(policy) else Reference
        models["ref_logprobs"] = kind(start, 1.0 if with_prm else temperature, budget, placement)
    if with_prm:
        if start is not policy:
            build_adapters(config, start)
        models["prm_logprobs"] = ImplicitPRM(
            start, config.prm, prm_beta(config, parts.credit), budget, config.train.seed, placement
        )
    return models


def build_placement(config: Config, ranks: Ranks) -> Placement:
    """How models lie on the processes.

    A config may ask for shards and still run on one process: without torchrun there is nothing to shard.

    Raises:
        UserError: offload is asked for without shards.
    """
    given = config.distributed
    if given.cpu_offload and given.strategy != "fsdp":
        raise UserError("distributed.cpu_offload goes with --distributed.strategy fsdp")
    if not ranks.grouped:
        return WHOLE
    device = pick_device(config.train.device)
    strategy = given.strategy
    if strategy == "auto":
        strategy = "ddp" if fits_whole(config, device) else "fsdp"
    return Placement(ranks, strategy, given.cpu_offload, device)


def load_model(config: Config, model: str, placement: Placement) -> Policy:
    """A model of the config, on the device; one that will be sharded in the CPU's memory."""
    device, home = ("cpu", placement.device) if placement.sharded else (config.train.device, None)
    policy = load_policy(model, device, config.train.dtype, config.trust_remote_code, home)
    if config.train.gradient_checkpointing:
        policy.checkpoint_layers()
    return policy


def build_adapters(config: Config, policy: Policy) -> None:
    """Give a policy the adapters of the config, if any."""
    given = config.lora
    if given.rank:
        add_adapters(policy, given.rank, given.alpha, given.targets, config.train.seed)
    elif has_adapters(policy):
        raise UserError("model: it has adapters; make one model of them with 'stepcredit merge', then train that")


def prm_beta(config: Config, credit: CreditFunction) -> float:
    """That of the credit function, so that rewards and loss have one scale."""
    parameter = inspect.signature(credit).parameters.get("beta")
    default = parameter.default if parameter and isinstance(parameter.default, (int, float)) else BETA
    return float(config.credit.options.get("beta", default))


def _check_prm(config: Config, objective: Objective) -> None:
    """Refuse what would give `ref_logprobs` two meanings."""
    unlike = config.sampler.temperature != 1
    if config.prm.reference == "policy" and unlike:
        raise UserError("prm.reference: policy needs --sampler.temperature 1, as the process reward model has")
    if objective.needs_reference and (unlike or config.prm.model or config.prm.reference == "policy"):
        raise UserError(
            "objective.kl.coef: the KL term would need another reference than the process reward model; leave it 0, or "
            "take --sampler.temperature 1, no --prm.model and --prm.reference start"
        )


def build_window(config: Config) -> Window | None:
    """The groups to train on, where they are filtered."""
    given = config.filter
    if not given.enabled:
        return None
    if given.low > given.high:
        raise UserError(f"filter.low ({given.low:g}) is above filter.high ({given.high:g})")
    return Window(given.low, given.high, given.drop_truncated, given.oversample, given.max_draws)

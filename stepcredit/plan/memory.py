"""The memory that a run takes on each GPU, by its parts, from the config of its model; its strategy follows from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from stepcredit.config import Config
from stepcredit.estimators.reads import models_beside
from stepcredit.plan.activations import saved_by_checkpoint, saved_by_layer, saved_outside
from stepcredit.plan.sizes import ModelSize, size_of
from stepcredit.policy.decoding import MAX_PREFILL
from stepcredit.policy.head import max_logits_on
from stepcredit.policy.paged import PAGE, CacheShape, pages_needed, pages_wanted, pool_bytes
from stepcredit.samplers.table import sampler_traits

GIB = 2**30
USABLE = 0.9  # share of a device's memory that a run may fill
ALWAYS, SAMPLING, PASS, STEP = "all the time", "while sampling", "in a training pass", "at the end of a step"
LOGIT_BUFFERS = 2  # fp32 buffers of a chunk of logits in a pass: logits, and their gradient in bf16 or fp32
DRAW_BUFFERS = 6  # fp32 buffers of [rows, vocabulary] when tokens are drawn


@dataclass(frozen=True)
class Part:
    """Bytes on each GPU, and when they are taken: always, or in one phase of an iteration."""

    when: str
    name: str
    bytes: float


@dataclass(frozen=True)
class Plan:
    """What a run takes on each GPU.

    Attributes:
        strategy: "ddp" or "fsdp".
        memory: bytes of a GPU, of which a run may fill `USABLE`.
        tokens: of the largest micro-batch that there will be; at least the longest path, which is never split.
        rows: completions that a process decodes at once; 0 where another program does, and where none are sampled.
        measured: the model is of a kind whose activations were measured.
    """

    strategy: str
    gpus: int
    memory: float
    tokens: int
    rows: int
    measured: bool
    parts: tuple[Part, ...]

    def taken(self, when: str) -> float:
        """Bytes in a phase, with what is there all the time."""
        return sum(part.bytes for part in self.parts if part.when in (ALWAYS, when))

    @property
    def tightest(self) -> str:
        """The phase that takes most."""
        return max((PASS, SAMPLING, STEP), key=self.taken)

    @property
    def peak(self) -> float:
        return self.taken(self.tightest)

    @property
    def usable(self) -> float:
        return USABLE * self.memory

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable


# ---------------------------------------------------------------------- models


@dataclass(frozen=True)
class Model:
    """A model of the run.

    Attributes:
        adapters: weights of its LoRA adapters; 0 without.
        trained: weights that have a gradient when it learns.
    """

    size: ModelSize
    adapters: int
    trained: int


@dataclass(frozen=True)
class Setting:
    """A run on its GPUs, with what follows from its options for the size of things.

    Attributes:
        sharded: weights, gradients and optimiser state are split among the GPUs (FSDP2).
        mixed: computed in bf16, with fp32 weights.
    """

    config: Config
    gpus: int
    sharded: bool
    mixed: bool

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.mixed else 4

    def held(self, weights: float) -> float:
        """Of weights, or what there is one of for each, those that this GPU holds outside of a pass."""
        if not self.sharded:
            return weights
        return 0.0 if self.config.distributed.cpu_offload else weights / self.gpus


def _model(config: Config, name: str) -> Model:
    size, rank, targets = size_of(name, config.trust_remote_code), config.lora.rank, config.lora.targets
    adapters = rank * sum(count for layer, count in size.linear.items() if not targets or layer in targets)
    return Model(size, adapters, adapters or size.weights)


# ---------------------------------------------------------------------- the estimate


def estimate_memory(config: Config, gpus: int, strategy: str, memory: float) -> Plan:
    """What a run takes on each of its GPUs.

    Args:
        strategy: "ddp" or "fsdp".
        memory: bytes of a GPU.

    A sampler that computes in another program is not counted, wherever that runs.
    """
    setting = Setting(config, gpus, strategy == "fsdp", config.train.dtype != "float32")
    policy = _model(config, config.model)
    parts, learning = _permanent(setting, policy)
    samples = not (sampler_traits(config).elsewhere or config.growth.recorded)
    sampling, rows = _sampling(setting, policy) if samples else ([], 0)
    tokens = micro_batch(config, gpus)
    passes = [_training_pass(setting, model, tokens) for model in learning]
    largest_pass = max(passes, key=lambda parts: sum(part.bytes for part in parts))
    step = _end_of_step(setting, max(learning, key=lambda model: model.trained))
    parts = [part for part in (*parts, *sampling, *largest_pass, *step) if part.bytes]
    measured = all(model.size.measured for model in learning)
    return Plan(strategy, gpus, memory, tokens, rows, measured, tuple(parts))


def bytes_per_weight(config: Config) -> float:
    """Bytes that models, gradients and optimiser state take for each weight of the policy, on one GPU."""
    size = ModelSize(
        weights=1, largest_layer=0, outside=0, linear={}, layers=0, vocabulary=0, hidden=0, intermediate=0, heads=0,
        kv_heads=0, head_dim=0, qk_norm=False, measured=False,
    )  # fmt: skip
    setting = Setting(config, 1, sharded=False, mixed=False)
    parts, learning = _permanent(setting, Model(size, 0, 1))
    return sum(part.bytes for part in (*parts, *_end_of_step(setting, max(learning, key=lambda model: model.trained))))


def _permanent(setting: Setting, policy: Model) -> tuple[list[Part], list[Model]]:
    """What is there all the time, and the models that learn."""
    config = setting.config
    whole_policy = policy.size.weights + policy.adapters
    parts = list(_learner("policy", setting, policy, whole_policy))
    learning = [policy]
    for load in models_beside(config):
        model = policy if load.model == config.model else _model(config, load.model)
        own = model.size.weights
        if load.adapted and model.adapters:
            shares_base = model is policy and not setting.sharded
            own = model.adapters + (0 if shares_base else model.size.weights)
        parts += _learner(load.name, setting, model, own, load.learns, load.adapted)
        if load.learns:
            learning.append(model)
    sampler = sampler_traits(config)
    if setting.sharded and sampler.copies_when_sharded:
        kind = "bf16" if setting.mixed else "fp32"
        parts.append(Part(ALWAYS, f"sampler: a whole copy of the policy, {kind}", setting.width * whole_policy))
    return parts, learning


def _learner(
    name: str, setting: Setting, model: Model, weights: int, learns: bool = True, adapted: bool = True
) -> Iterator[Part]:
    """A model and what it learns with.

    Args:
        weights: those that it holds for itself.
        adapted: if the run has adapters, it has some; the rest of its weights is then as it is computed with.
    """
    frozen = weights - model.adapters if adapted and model.adapters and setting.mixed else 0
    yield Part(ALWAYS, f"{name}: frozen weights, bf16", 2 * setting.held(frozen))
    yield Part(ALWAYS, f"{name}: weights, fp32", 4 * setting.held(weights - frozen))
    if learns:
        yield Part(ALWAYS, f"{name}: AdamW, fp32", 8 * setting.held(model.trained))


def micro_batch(config: Config, gpus: int) -> int:
    """Tokens of the largest micro-batch: the budget, at least one path, at most what a process has in a step."""
    step = tokens_of_a_step(config, gpus)
    return max(longest_path(config), min(config.optim.max_tokens_per_micro_batch, step))


def longest_path(config: Config) -> int:
    """Tokens of a prompt with its completion at most."""
    return config.task.max_prompt_tokens + config.sampler.max_new_tokens


def tokens_of_a_step(config: Config, gpus: int) -> int:
    """Tokens that a process has in an optimiser step at most."""
    trees = math.ceil(config.train.problems_per_iteration / gpus)
    return trees * (config.task.max_prompt_tokens + _completions(config) * config.sampler.max_new_tokens)


def _completions(config: Config) -> int:
    """Of a problem."""
    return config.growth.completions()


def _training_pass(setting: Setting, model: Model, tokens: int) -> list[Part]:
    """A forward and backward of a micro-batch."""
    size, mixed, sharded, width = model.size, setting.mixed, setting.sharded, setting.width
    layer = saved_by_layer(size, mixed, sharded)
    # One layer more than is saved, for what its backward holds at a time.
    activations = (size.layers + 1) * layer
    if setting.config.train.gradient_checkpointing:
        activations = min(activations, size.layers * saved_by_checkpoint(size, mixed, sharded) + 2 * layer)
    activations += saved_outside(size, mixed, sharded)
    parts = [
        Part(PASS, "gradients, fp32", 4 * setting.held(model.trained)),
        Part(PASS, f"activations of {tokens} tokens", tokens * activations),
    ]
    head = size.vocabulary * size.hidden
    if sharded:
        share = model.trained / size.weights  # of a layer's weights, those that have a gradient
        gathered = width * (2 * size.largest_layer + size.outside) + (width + 4) * size.largest_layer * share
        parts.append(Part(PASS, "gathered: two layers and what is outside", gathered))
    elif mixed:
        cast = model.adapters or size.weights - size.outside + head
        parts.append(Part(PASS, "bf16 casts of weights", 2 * cast))
    logits = LOGIT_BUFFERS * 4 * max(min(max_logits_on("cuda"), tokens * size.vocabulary), size.vocabulary)
    gradient = 0 if model.adapters else head * (4 + (2 if mixed else 0))
    parts.append(Part(PASS, "output layer: chunks of logits, its gradient", logits + gradient))
    return parts


def _end_of_step(setting: Setting, largest: Model) -> list[Part]:
    """The update of the model that trains most weights; AdamW is one kernel, without buffers."""
    spreading = (2 * setting.width + 4) * largest.size.outside if setting.sharded and not largest.adapters else 0
    return [
        Part(STEP, "gradients, fp32", 4 * setting.held(largest.trained)),
        Part(STEP, "buffers of spreading gradients", spreading),
    ]


def _sampling(setting: Setting, policy: Model) -> tuple[list[Part], int]:
    """What the sampler takes, and the rows that it decodes at once in the call that takes most."""
    size = policy.size
    shape = CacheShape(size.layers, size.kv_heads, size.head_dim, torch.bfloat16 if setting.mixed else torch.float32)
    pages, prompts, rows = max(_sampler_calls(setting, shape))
    parts = [Part(SAMPLING, f"pages of keys and values of {rows} rows", pool_bytes(shape, pages))]
    if setting.mixed and not setting.sharded and not policy.adapters:
        cast = size.weights - size.outside + size.vocabulary * size.hidden
        parts.append(Part(SAMPLING, "bf16 copies of weights", 2 * cast))
    buffers = min(prompts, MAX_PREFILL) * saved_by_layer(size, setting.mixed, setting.sharded)
    buffers += DRAW_BUFFERS * 4 * rows * size.vocabulary
    parts.append(Part(SAMPLING, "prompts being read, logits being drawn from", buffers))
    return parts, rows


def _sampler_calls(setting: Setting, shape: CacheShape) -> Iterator[tuple[int, int, int]]:
    """For training and for evaluation: pages of keys and values, tokens of prompts, rows."""
    config, gpus = setting.config, setting.gpus
    growth = config.growth
    reuses = growth.name == "tree"
    siblings = max(1, growth.num_branches - 1) if reuses else growth.group_size
    oversample = config.filter.oversample if config.filter.enabled else 1
    problems = math.ceil(config.train.problems_per_iteration * oversample / gpus)
    evaluated = math.ceil(config.eval.num_problems / gpus) * config.eval.num_samples
    calls = ((problems * _completions(config), siblings, reuses), (evaluated, config.eval.num_samples, False))
    for total, rows_of_a_prompt, keeps in calls:
        rows = min(config.sampler.max_rows, total)
        prompts, longest = math.ceil(rows / rows_of_a_prompt), config.task.max_prompt_tokens
        least = pages_needed(rows, config.sampler.max_new_tokens, prompts + 1, longest, PAGE) if rows else 0
        cached = config.sampler.keep_mb * 2**20 // (PAGE * shape.token_bytes) if keeps else 0
        yield pages_wanted(least, cached), prompts * longest, rows


# ---------------------------------------------------------------------- the strategy


def fits_whole(config: Config, device: torch.device) -> bool:
    """Whether a run fits on the device with a copy of every model, gradients and optimiser state on each process."""
    if device.type != "cuda":
        return True
    gpus = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return estimate_memory(config, gpus, "ddp", torch.cuda.get_device_properties(device).total_memory).fits


def chosen_strategy(config: Config, gpus: int, memory: float) -> str:
    """The strategy that a run takes."""
    strategy = config.distributed.strategy
    if strategy != "auto":
        return strategy
    return "ddp" if gpus == 1 or estimate_memory(config, gpus, "ddp", memory).fits else "fsdp"


def plan_of(config: Config, gpus: int, memory: float) -> Plan:
    """The plan of a run with the strategy that it takes."""
    return estimate_memory(config, gpus, chosen_strategy(config, gpus, memory), memory)

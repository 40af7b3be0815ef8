"""Memory of a run on each GPU by its parts, reckoned from the model's config alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from stepcredit.config import Config
from stepcredit.credit import CREDIT, needs_of
from stepcredit.errors import UserError
from stepcredit.imports import by_name
from stepcredit.policy.decoding import MAX_PREFILL
from stepcredit.policy.head import MAX_LOGITS
from stepcredit.policy.loading import source_of
from stepcredit.samplers.table import sampler_traits

GIB = 2**30
USABLE = 0.9  # share of a device's memory that a run may fill
MEASURED = ("llama", "qwen2", "qwen3")  # kinds of models whose activations the formula was compared with
ALWAYS, SAMPLING, PASS, STEP = "all the time", "while sampling", "in a training pass", "at the end of a step"
LOGIT_BUFFERS = 4  # fp32 buffers of MAX_LOGITS in a pass
DRAW_BUFFERS = 6  # fp32 buffers of [rows, vocabulary] when tokens are drawn
LARGEST_BUDGET = 1 << 24
MOST_GPUS = 256
LORA_RANK = 16


@dataclass(frozen=True)
class Size:
    """Numbers of a model.

    Attributes:
        weights: all, tied ones once; largest_layer: those of one layer; outside: those outside the layers.
        linear: LoRA weights of rank 1 by name of the layer.
        qk_norm: queries and keys are normalised.
        measured: the formula for activations holds; otherwise it is an estimate.
    """

    weights: int
    largest_layer: int
    outside: int
    linear: dict[str, int]
    layers: int
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    measured: bool


@cache
def size_of(model: str, trust_remote_code: bool = False) -> Size:
    """Count a model's weights without loading them; a folder needs no more than its config.json.

    Raises:
        UserError: its config cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = source_of(model, config_only=True)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model: cannot read the config of '{model}' ({why})") from error
    network.tie_weights()
    return size_of_network(network)


def size_of_network(network: Any) -> Size:
    """Numbers of a transformers model, which may be on the meta device."""
    names = set(network._no_split_modules or ())
    layers = [module for module in network.modules() if type(module).__name__ in names]
    sizes = [sum(value.numel() for value in layer.parameters()) for layer in layers]
    total = sum(value.numel() for value in network.parameters())
    head = network.get_output_embeddings()
    linear: dict[str, int] = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            last = name.split(".")[-1]
            linear[last] = linear.get(last, 0) + module.in_features + module.out_features
    config = network.config.get_text_config()
    vocabulary, hidden = head.weight.shape
    heads = getattr(config, "num_attention_heads", None) or max(1, hidden // 64)
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    if experts := getattr(config, "num_experts_per_tok", None):
        wide = experts * (getattr(config, "moe_intermediate_size", None) or wide)
    return Size(
        weights=total,
        largest_layer=max(sizes, default=total),
        outside=total - sum(sizes),
        linear=linear,
        layers=len(layers) or getattr(config, "num_hidden_layers", 1),
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=wide,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        qk_norm=any(name.endswith("q_norm") for name, _ in network.named_modules()),
        measured=config.model_type in MEASURED,
    )


# ---------------------------------------------------------------------- activations


def saved_by_layer(size: Size, mixed: bool = True, sharded: bool = False) -> int:
    """Bytes a token that autograd keeps of one layer.

    With hidden size h, intermediate size i, q = heads * head_dim, k = kv heads * head_dim, and a bytes a number:

        queries, keys, values and their output, which is the input of the next product     a (2 q + 2 k)
        log of the sum of exponentiated scores, and two root mean squares, fp32            4 heads + 8
        gate, its activation, up, their product                                            4 a i
        both norms: input, normalised input, output              12 h each in fp32; 8 h each when sharded in bf16
        the same under autocast, where each of the five products casts the output anew      2 * 8 h + 5 * 2 h
        norms of queries and keys: in fp32, and normalised               (4 + a) (q + k) + 4 (heads + kv heads)

    Args:
        mixed: computed in bf16.
        sharded: the residual stream is bf16 as well (FSDP2 casts what goes into a layer).
    """
    a = 2 if mixed else 4
    queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
    norms = 24 if not mixed else 16 if sharded else 26
    found = norms * size.hidden + a * (2 * queries + 2 * keys) + 4 * size.heads + 8 + 4 * a * size.intermediate
    if size.qk_norm:
        found += (4 + a) * (queries + keys) + 4 * (size.heads + size.kv_heads)
    return found


def saved_by_checkpoint(size: Size, mixed: bool = True, sharded: bool = False) -> int:
    """Bytes a token that a checkpointed layer keeps: what goes into it."""
    return (2 if mixed and sharded else 4) * size.hidden


def saved_outside(size: Size, mixed: bool = True, sharded: bool = False) -> int:
    """Bytes a token that autograd keeps outside the layers: the last norm, states, rotary angles, numbers of tokens."""
    return (8 if mixed and sharded else 12) * size.hidden + 8 * size.head_dim + 32


# ---------------------------------------------------------------------- a plan


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
        rows: completions that a process decodes at once; 0 where another program does.
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


@dataclass(frozen=True)
class _Learning:
    """A model that learns: its numbers, and how many of its weights do."""

    size: Size
    adapters: int
    trained: int


def _learning(config: Config, model: str) -> _Learning:
    size, rank, targets = size_of(model, config.trust_remote_code), config.lora.rank, config.lora.targets
    adapters = rank * sum(count for name, count in size.linear.items() if not targets or name in targets)
    return _Learning(size, adapters, adapters or size.weights)


def reckon(config: Config, gpus: int, strategy: str, memory: float) -> Plan:
    """What a run takes on each of its GPUs.

    Args:
        strategy: "ddp" or "fsdp".
        memory: bytes of a GPU.

    A sampler that computes in another program is not counted, wherever that runs.
    """
    sharded, mixed = strategy == "fsdp", config.train.dtype != "float32"
    width = 2 if mixed else 4
    split = gpus if sharded else 1
    here = 0 if sharded and config.distributed.cpu_offload else 1
    policy = _learning(config, config.model)
    parts: list[Part] = []
    learning: list[_Learning] = []

    def add(when: str, name: str, size: float) -> None:
        if size:
            parts.append(Part(when, name, float(size)))

    def learner(name: str, model: _Learning, weights: int, learns: bool = True) -> None:
        add(ALWAYS, f"{name}: weights, fp32", 4 * weights / split * here)
        if not learns:
            return
        learning.append(model)
        add(ALWAYS, f"{name}: AdamW, fp32", 8 * model.trained / split * here)
        if not sharded and gpus > 1:
            add(ALWAYS, f"{name}: DDP's buckets of gradients", 4 * model.trained)

    learner("policy", policy, policy.size.weights + policy.adapters)
    columns = needs_of(by_name("credit.name", config.credit.name, CREDIT)).columns
    prm = "prm_logprobs" in columns
    start = _learning(config, config.prm.model) if prm and config.prm.model else policy
    reference = config.objective.kl.coef != 0 or "ref_logprobs" in columns or prm
    own = (prm and config.prm.reference == "policy") or (start is policy and policy.adapters)
    if reference and not own:
        add(ALWAYS, "reference: weights, fp32", 4 * start.size.weights / split * here)
    if prm:
        shared = start is policy and start.adapters and not sharded
        weights = start.adapters + (0 if shared else start.size.weights)
        learner("reward model", start, weights, learns=config.prm.update != "none")
    sampler = sampler_traits(config)
    if sharded and sampler.copies_when_sharded:
        kind = "bf16" if mixed else "fp32"
        add(ALWAYS, f"sampler: a whole copy of the policy, {kind}", width * (policy.size.weights + policy.adapters))
    if config.growth.name == "tree" and not sampler.elsewhere:
        add(ALWAYS, "sampler: kept keys and values", config.sampler.keep_mb * 2**20)

    rows = 0
    if not sampler.elsewhere:
        for part, taken in _sampling(config, policy, gpus, sharded):
            parts.append(part)
            rows = max(rows, taken)
    tokens = micro_batch(config, gpus)
    passes = [_pass(config, model, gpus, sharded, tokens) for model in learning]
    parts += max(passes, key=lambda found: sum(part.bytes for part in found))
    largest = max(learning, key=lambda model: model.trained)
    add(STEP, "gradients, fp32", 4 * largest.trained / split * here)
    spreading = (2 * width + 4) * largest.size.outside if sharded and not largest.adapters else 0
    add(STEP, "buffers of AdamW, or of spreading gradients", max(4 * largest.trained / split * here, spreading))
    measured = all(model.size.measured for model in learning)
    return Plan(strategy, gpus, memory, tokens, rows, measured, tuple(parts))


def micro_batch(config: Config, gpus: int) -> int:
    """Tokens of the largest micro-batch: the budget, at least one path, at most what a process has in a step."""
    longest = config.task.max_prompt_tokens + config.sampler.max_new_tokens
    return max(longest, min(config.optim.max_tokens_per_micro_batch, _tokens_of_a_step(config, gpus)))


def _tokens_of_a_step(config: Config, gpus: int) -> int:
    """Tokens that a process has in an optimiser step at most."""
    growth = config.growth
    completions = growth.group_size if growth.name == "flat" else growth.num_branches**growth.depth
    trees = math.ceil(config.train.problems_per_iteration / gpus)
    return trees * (config.task.max_prompt_tokens + completions * config.sampler.max_new_tokens)


def _pass(config: Config, model: _Learning, gpus: int, sharded: bool, tokens: int) -> list[Part]:
    """A forward and backward of a micro-batch."""
    size, mixed = model.size, config.train.dtype != "float32"
    width = 2 if mixed else 4
    here = 0 if sharded and config.distributed.cpu_offload else 1
    head = size.vocabulary * size.hidden
    layer, outside = saved_by_layer(size, mixed, sharded), saved_outside(size, mixed, sharded)
    # One layer more than is kept, for what its backward holds at a time.
    kept = (size.layers + 1) * layer
    if config.train.gradient_checkpointing:
        kept = min(kept, size.layers * saved_by_checkpoint(size, mixed, sharded) + 2 * layer)
    found = [
        Part(PASS, "gradients, fp32", 4 * model.trained / (gpus if sharded else 1) * here),
        Part(PASS, f"activations of {tokens} tokens", tokens * (kept + outside)),
    ]
    if sharded:
        share = model.trained / size.weights  # of a layer's weights, those that have a gradient
        gathered = width * (2 * size.largest_layer + size.outside) + (width + 4) * size.largest_layer * share
        found.append(Part(PASS, "gathered: two layers and what is outside", gathered))
    elif mixed:
        found.append(Part(PASS, "bf16 casts of weights", 2 * (size.weights - size.outside + head)))
    logits = LOGIT_BUFFERS * 4 * max(MAX_LOGITS, size.vocabulary)
    gradient = 0 if model.adapters else head * (4 + (2 if mixed else 0))
    found.append(Part(PASS, "output layer: chunks of logits, its gradient", logits + gradient))
    return [part for part in found if part.bytes]


def _sampling(config: Config, policy: _Learning, gpus: int, sharded: bool) -> Iterator[tuple[Part, int]]:
    """What the sampler takes in the call that takes most, each part with the rows that are decoded at once."""
    size, mixed = policy.size, config.train.dtype != "float32"
    growth, limit, prompt = config.growth, config.sampler.max_new_tokens, config.task.max_prompt_tokens
    tree = growth.name == "tree"
    siblings = max(1, growth.num_branches - 1) if tree else growth.group_size
    oversample = config.filter.oversample if config.filter.enabled else 1
    problems = math.ceil(config.train.problems_per_iteration * oversample / gpus)
    completions = problems * (growth.num_branches**growth.depth if tree else growth.group_size)
    examined = math.ceil(config.eval.num_problems / gpus) * config.eval.num_samples
    calls = []  # tokens whose keys and values are held, those of prompts, rows
    for total, share in ((completions, siblings), (examined, config.eval.num_samples)):
        rows = min(config.sampler.max_rows, total)
        prompts = math.ceil(rows / share) * prompt
        calls.append((rows * limit + prompts, prompts, rows))
    tokens, prompts, rows = max(calls)
    a_token = 2 * size.kv_heads * size.head_dim * (2 if mixed else 4)
    yield Part(SAMPLING, f"keys and values of {rows} rows", tokens * a_token * (size.layers + 1)), rows
    if mixed and not sharded:
        held = 0 if policy.adapters else size.weights - size.outside  # frozen ones are cast one by one
        yield Part(SAMPLING, "bf16 casts of weights", 2 * (held + size.vocabulary * size.hidden)), 0
    buffers = min(prompts, MAX_PREFILL) * saved_by_layer(size, mixed, sharded)
    buffers += DRAW_BUFFERS * 4 * rows * size.vocabulary
    yield Part(SAMPLING, "prompts being read, logits being drawn from", buffers), 0


# ---------------------------------------------------------------------- choices


def fits_whole(config: Config, device: torch.device) -> bool:
    """Whether a run fits on the device with a copy of every model, gradients and optimiser state on each process."""
    if device.type != "cuda":
        return True
    gpus = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return reckon(config, gpus, "ddp", torch.cuda.get_device_properties(device).total_memory).fits


def chosen(config: Config, gpus: int, memory: float) -> str:
    """The strategy that a run takes."""
    given = config.distributed.strategy
    if given != "auto":
        return given
    return "ddp" if gpus == 1 or reckon(config, gpus, "ddp", memory).fits else "fsdp"


def asked(config: Config, gpus: int, memory: float) -> Plan:
    """The plan of what a config asks for."""
    return reckon(config, gpus, chosen(config, gpus, memory), memory)


def largest_budget(config: Config, plan: Plan) -> int:
    """The largest optim.max_tokens_per_micro_batch whose passes fit; 0 where not even the longest path does."""

    def fits(tokens: int) -> bool:
        changed = changed_by(config, {"optim.max_tokens_per_micro_batch": tokens})
        return reckon(changed, plan.gpus, plan.strategy, plan.memory).taken(PASS) <= plan.usable

    low = config.task.max_prompt_tokens + config.sampler.max_new_tokens
    high = max(low, min(LARGEST_BUDGET, _tokens_of_a_step(config, plan.gpus)))
    return _largest(low, high, fits)


def largest_rows(config: Config, plan: Plan) -> int:
    """The largest sampler.max_rows, up to what is asked for, whose sampling fits; 0 where one row does not."""

    def fits(rows: int) -> bool:
        changed = changed_by(config, {"sampler.max_rows": rows})
        return reckon(changed, plan.gpus, plan.strategy, plan.memory).taken(SAMPLING) <= plan.usable

    return _largest(1, config.sampler.max_rows, fits)


def _largest(low: int, high: int, fits: Any) -> int:
    """The largest number in [low, high] that fits, of which all smaller ones do; 0 when none does."""
    if not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Advice:
    """Options that make a run fit, and its plan with them."""

    options: str
    plan: Plan


def advise(config: Config, gpus: int, memory: float) -> list[Advice]:
    """Changes that make a run fit that does not, each checked by its own plan; the simplest first."""
    shards: dict[str, Any] = {"distributed.strategy": "fsdp"}
    again: dict[str, Any] = {"train.gradient_checkpointing": True}
    changes: list[tuple[dict[str, Any], int]] = [({}, gpus), (again, gpus)]
    if gpus > 1:
        changes += [(shards, gpus), (shards | again, gpus)]
    changes.append((shards | {"distributed.cpu_offload": True}, gpus))
    if not config.lora.rank:
        changes += [({"lora.rank": LORA_RANK}, gpus), (shards | {"lora.rank": LORA_RANK}, gpus)]
    more = [gpus * factor for factor in (2, 4, 8, 16, 32) if gpus * factor <= MOST_GPUS]
    found: list[Advice] = []
    for change, number in changes:
        advice = _trimmed(config, change, number, memory, gpus)
        if advice is not None and advice.plan not in [other.plan for other in found]:
            found.append(advice)
    for number in more:
        advice = _trimmed(config, shards, number, memory, gpus)
        if advice is not None:
            return [*found, advice]
    return found


def _trimmed(config: Config, change: dict[str, Any], gpus: int, memory: float, before: int) -> Advice | None:
    """A change, with fewer rows and a smaller budget where that is needed too; None where even these do not help."""
    change = {name: value for name, value in change.items() if _value(config, name) != value}
    config = changed_by(config, change)
    plan = asked(config, gpus, memory)
    if plan.taken(SAMPLING) > plan.usable:
        change["sampler.max_rows"] = _round(largest_rows(config, plan), 8)
    if plan.taken(PASS) > plan.usable:
        longest = config.task.max_prompt_tokens + config.sampler.max_new_tokens
        change["optim.max_tokens_per_micro_batch"] = max(longest, _round(largest_budget(config, plan), 256))
    plan = asked(changed_by(config, change), gpus, memory)
    if not plan.fits:
        return None
    words = [f"--{name.replace('_', '-')} {str(value).lower()}" for name, value in change.items()]
    return Advice(" ".join([*([f"--gpus {gpus}"] if gpus != before else []), *words]), plan)


def _round(number: int, step: int) -> int:
    """Down to a multiple of `step`, but not to 0."""
    return number // step * step or max(1, number)


def _value(config: Config, name: str) -> Any:
    section, option = name.split(".")
    return getattr(getattr(config, section), option)


def changed_by(config: Config, change: dict[str, Any]) -> Config:
    """A config with other values of some `section.option`."""
    for name, value in change.items():
        section, option = name.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={option: value})})
    return config

"""One schema for every run: YAML file, then `--section.option value`, over the algorithm's and the recipe's defaults.

defaults here < the algorithm's (algorithms.py) < the recipe of the embedded model < YAML file < command line
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stepcredit.algorithms import algorithm
from stepcredit.errors import UserError, did_you_mean


def _split(value: Any) -> Any:
    """`a,b` as a list, and a lone number as a list of one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [value]
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Decay = Annotated[float, Field(ge=0, lt=1)]
Names = Annotated[list[str], BeforeValidator(_split)]
Ids = Annotated[list[int] | None, BeforeValidator(_split)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class TaskConfig(Section):
    data: str = "embedded"  # embedded | file (.jsonl .json .csv .parquet) | hub id
    split: str = "train"
    eval_data: str | None = None  # held-out problems; None holds out a share of `data`
    eval_split: str = "test"
    held_out: float = Field(0.1, ge=0, lt=1)
    columns: dict[str, str] = {}  # question, answer, id -> name of the column
    system_prompt: str | None = None
    prompt_template: str | None = None  # text around a question, {question} and {COLUMN} filled in
    max_prompt_tokens: int = Field(1024, ge=1)
    chat_template_kwargs: dict[str, Any] = {}  # of the tokenizer's chat template, such as enable_thinking
    long_prompts: Literal["drop", "raise"] = "drop"  # rows over max_prompt_tokens are left out and counted, or an error


class VLLMConfig(Section):
    servers: Names = []  # addresses of running servers, such as http://127.0.0.1:8000
    launch: bool = False  # start one on this machine, for as long as the run lasts
    python: str | None = None  # interpreter of the environment with vLLM; None: that of the run
    port: int = Field(0, ge=0, lt=65536)  # of the one started; 0: a free one
    args: Names = []  # further arguments of the one started
    transfer: Literal["auto", "folder", "nccl", "gloo"] = "auto"  # of weights: from GPU to GPU, by files, or by network
    folder: str | None = None  # where weights are written for servers that see it; None: in this machine's memory
    timeout_s: float = Field(600.0, gt=0)  # of a request
    patience_s: float = Field(300.0, gt=0)  # how long requests are tried again
    tolerance: float | None = Field(None, gt=0)  # mean log-probability difference that ends a run; None: by the type


class SamplerConfig(Section):
    name: Literal["transformers", "vllm"] = "transformers"
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_new_tokens: int = Field(1024, ge=1)
    stop_token_ids: Ids = None  # None: the model's own
    max_rows: int = Field(256, ge=1)
    keep_mb: int = Field(4096, ge=0)  # keys and values that growing trees go on from
    vllm: VLLMConfig = VLLMConfig()


class StepConfig(Section):
    tokens: int | None = Field(None, ge=1)  # a step ends after so many tokens
    delimiters: Names = []  # ... or after a token that holds one: newline, sentence, task (the task's own) or a text


class GrowthConfig(Section):
    name: Literal["flat", "tree"] = "flat"
    group_size: int = Field(8, ge=1)  # flat
    num_branches: int = Field(8, ge=2)  # tree, as all that follows
    depth: int = Field(3, ge=1)
    step: StepConfig = StepConfig()
    mode: Literal["complete", "stepwise"] = "complete"  # whole completions that are cut, or step by step
    max_segments: int = Field(0, ge=0)  # of a tree; 0: no limit
    max_tokens: int = Field(0, ge=0)  # of a tree; 0: no limit


class RewardConfig(Section):
    functions: Names = []  # empty: the task's own
    weights: Annotated[list[float], BeforeValidator(_split)] = []  # empty: all 1
    options: dict[str, dict[str, Any]] = {}  # by function: further arguments
    timeout_s: float = Field(10.0, gt=0)  # of a call; its worker process is killed then
    on_failure: Literal["drop", "zero", "raise"] = "drop"  # time-outs and errors: unjudged, reward 0, or the end
    call_with: Literal["row", "group", "batch"] = "row"  # completions that a call of your own function gets
    workers: int | None = Field(None, ge=0)  # None: by the cores; 0: calls in this process, without deadlines
    memory_mb: int = Field(4096, ge=0)  # address space of a worker; 0: no limit
    gold_check: int = Field(64, ge=0)  # rows whose gold answer must score before training starts; 0: none
    gold_threshold: float = Field(0.9, ge=0, le=1)  # share of them


class CreditConfig(BaseModel):
    """`name` and the credit function's own options."""

    model_config = ConfigDict(extra="allow")
    name: str = "grpo"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class KLConfig(Section):
    estimator: Literal["k1", "k2", "k3"] = "k3"  # k1 acts in the reward, k2 and k3 in the loss
    coef: float = 0.0


class ObjectiveConfig(Section):
    surrogate: Literal["clip", "reinforce"] = "clip"
    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.2, ge=0)
    dual_clip: float = Field(0.0, ge=0)
    aggregate: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "sum_over_constant"] = "token_mean"
    kl: KLConfig = KLConfig()
    entropy_coef: float = 0.0
    importance: Literal["none", "token", "sequence"] = "none"  # weights for what the sampler computes otherwise
    importance_cap: float = Field(2.0, gt=0)
    depth_weights: Annotated[list[float], BeforeValidator(_split)] = []  # of segments by depth; empty: all alike


class OptimConfig(Section):
    learning_rate: float = Field(1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(0, ge=0)  # iterations
    weight_decay: float = Field(0.0, ge=0)
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(_split)] = (0.9, 0.999)
    grad_clip: float = Field(1.0, gt=0)
    num_epochs: int = Field(1, ge=1)
    num_minibatches: int = Field(1, ge=1)
    max_tokens_per_micro_batch: int = Field(16384, ge=1)
    max_nonfinite: int = Field(5, ge=1)  # optimiser steps in a row without a finite gradient, then the run stops


class PRMConfig(Section):
    model: str | None = None  # folder | hub id; None: the policy as it is at first
    reference: Literal["start", "policy"] = "start"  # the frozen start, or the policy's own old log-probabilities
    update: Literal["after", "before", "none"] = "after"  # of the rewards of the same batch
    learning_rate: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: Annotated[tuple[Decay, Decay], BeforeValidator(_split)] = (0.9, 0.999)
    grad_clip: float = Field(10.0, gt=0)
    num_minibatches: int = Field(1, ge=1)


class FilterConfig(Section):
    enabled: bool = False
    low: float = 0.2  # smallest and largest mean reward of a group, both included
    high: float = 0.8
    drop_truncated: bool = False  # groups with a truncated completion do not pass
    oversample: float = Field(1.0, ge=1)  # problems sampled for each that is missing
    max_draws: float = Field(4.0, ge=1)  # problems sampled at most in an iteration, in multiples of the batch


class TrainConfig(Section):
    iterations: int = Field(100, ge=1)
    problems_per_iteration: int = Field(16, ge=1)
    seed: int = Field(0, ge=0, lt=2**31)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; weights are always fp32
    gradient_checkpointing: bool = False  # keep only what goes into the layers; a backward computes them again


class DistributedConfig(Section):
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"  # whole models on each process, or shards; auto: what fits
    cpu_offload: bool = False  # shards and optimiser state in the CPU's memory (fsdp)
    timeout_s: float = Field(1800.0, gt=0)  # a process that does not answer for so long ends the run


class LoraConfig(Section):
    rank: int = Field(0, ge=0)  # of the adapters; 0: none, all weights learn
    alpha: float = Field(32.0, gt=0)  # adapters are scaled by alpha / rank
    targets: Names = []  # linear layers by name, such as q_proj; empty: all but the output layer


class EvalConfig(Section):
    every: int = Field(0, ge=0)  # iterations; 0: only before the first and after the last
    num_problems: int = Field(200, ge=0)
    num_samples: int = Field(1, ge=1)
    greedy: bool = True


class CheckpointConfig(Section):
    every: int = Field(50, ge=0)  # iterations; 0: only at the end
    keep: int = Field(2, ge=1)


class TrackConfig(Section):
    sinks: Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(_split)] = []  # beside metrics.jsonl
    project: str = "stepcredit"  # of Weights & Biases


class RecordConfig(Section):
    every: int = Field(10, ge=0)  # iterations between saved rollouts; 0: none
    max_trees: int = Field(16, ge=1)
    show: int = Field(50, ge=0)  # iterations between completions shown while training; 0: none


class Config(Section):
    algorithm: str = "grpo"
    model: str = "embedded"  # embedded | folder | hub id
    trust_remote_code: bool = False  # run code that comes with a hub model
    task: TaskConfig = TaskConfig()
    sampler: SamplerConfig = SamplerConfig()
    growth: GrowthConfig = GrowthConfig()
    reward: RewardConfig = RewardConfig()
    filter: FilterConfig = FilterConfig()
    shapers: Names = []
    credit: CreditConfig = CreditConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    prm: PRMConfig = PRMConfig()
    lora: LoraConfig = LoraConfig()
    distributed: DistributedConfig = DistributedConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    rollouts: RecordConfig = RecordConfig()
    track: TrackConfig = TrackConfig()
    run_dir: str | None = None  # None: runs/ALGORITHM-NUMBER


SECTIONS = {name for name, field in Config.model_fields.items() if isinstance(field.default, BaseModel)}

EMBEDDED_RECIPE: dict[str, Any] = {
    "sampler": {"max_new_tokens": 128, "max_rows": 512},
    "optim": {"learning_rate": 4e-4, "schedule": "cosine"},
    "train": {"iterations": 120},
    "eval": {"num_problems": 600},
    "prm": {"learning_rate": 4e-3, "reference": "policy"},  # the policy runs away from a frozen one
    "filter": {"enabled": False},  # most problems of the base model are too hard for the window
}
EMBEDDED_TREES: dict[str, Any] = {  # about as many tokens an iteration as 16 groups of 8
    "growth": {"num_branches": 3, "depth": 2, "step": {"tokens": None, "delimiters": ["task"]}},
    "train": {"problems_per_iteration": 17},
}
EMBEDDED_CREDIT: dict[str, dict[str, Any]] = {  # log-ratios of a tiny model at this learning rate are large
    "spro": {"beta": 0.003},
    "prime": {"process_coef": 0.1},
}


def resolve(given: Mapping[str, Any]) -> Config:
    """The full config: what a user gave (a nested dictionary) over the defaults of the algorithm and recipe.

    Raises:
        UserError: naming the option that is unknown or has a value that does not fit.
    """
    chosen = algorithm(str(given.get("algorithm", "grpo")))
    layers: list[Mapping[str, Any]] = [
        {"credit": {"name": chosen.credit}, "objective": dict(chosen.objective), "growth": dict(chosen.growth)},
        {"filter": dict(chosen.filter)},
    ]
    credit = given.get("credit")
    same_credit = not isinstance(credit, Mapping) or credit.get("name", chosen.credit) == chosen.credit
    if same_credit:  # another credit function has other options
        layers.append({"credit": dict(chosen.credit_options)})
    if given.get("model", "embedded") == "embedded":
        layers += [EMBEDDED_RECIPE, EMBEDDED_TREES if chosen.growth else {}]
        if same_credit:
            layers.append({"credit": EMBEDDED_CREDIT.get(chosen.credit, {})})
    merged: dict[str, Any] = {}
    for layer in [*layers, given]:
        merged = merge(merged, layer)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(error)) from error


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        if value is None and (isinstance(merged.get(key), Mapping) or key in SECTIONS):
            continue  # a section of a YAML file with nothing under it
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def read_yaml(path: str) -> dict[str, Any]:
    """A config file as a nested dictionary."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file")
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not YAML ({getattr(error, 'problem', error)})") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise UserError(f"{path}: expected sections such as `train:`, found {type(loaded).__name__}")
    loaded = loaded or {}
    return loaded | {"credit": _numbers(loaded["credit"])} if "credit" in loaded else loaded


def dump_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads `1e-6` as text; where no schema says that it is a number, take it for one."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return parse_value(value) if value[:1] in "+-.0123456789" and "e" in value.lower() else value
    return value


def parse_value(text: str) -> Any:
    """What a command-line value means: number, boolean, null, list, or text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return parsed if parsed is None or isinstance(parsed, (bool, list, dict)) else text


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        section: Any = Config
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        return f"{name}: unknown option; {did_you_mean(path[-1], section.model_fields)}"
    if first["type"] == "literal_error":
        return f"{name}: '{first['input']}' is not known; {did_you_mean(str(first['input']), _choices(first))}"
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{name}: expected a section with options, found {first['input']!r:.60}"
    return f"{name}: {first['msg'].lower()}, got {first['input']!r:.60}"


def _choices(error: Any) -> list[str]:
    """The valid values of an option that names one of a few."""
    return re.findall(r"'([^']*)'", error["ctx"]["expected"])

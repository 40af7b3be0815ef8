"""How long a run is, and what it keeps, writes and shows."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from stepcredit.section import Section, split


class TrainOptions(Section):
    iterations: int = Field(100, ge=1)
    problems_per_iteration: int = Field(16, ge=1)
    seed: int = Field(0, ge=0, lt=2**31)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the computation; weights are always fp32
    gradient_checkpointing: bool = False  # keep only what goes into the layers; a backward computes them again


class EvalOptions(Section):
    every: int = Field(0, ge=0)  # iterations; 0: only before the first and after the last
    num_problems: int = Field(200, ge=0)
    num_samples: int = Field(1, ge=1)
    greedy: bool = True


class CheckpointOptions(Section):
    every: int = Field(50, ge=0)  # iterations; 0: only at the end
    keep: int = Field(2, ge=1)
    changed_data: Literal["stop", "continue"] = "stop"  # where a resumed run finds other rows than it began with


class RolloutOptions(Section):
    every: int = Field(10, ge=0)  # iterations between saved rollouts; 0: none
    max_trees: int = Field(16, ge=1)
    show: int = Field(50, ge=0)  # iterations between completions shown while training; 0: none


class TrackOptions(Section):
    sinks: Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(split)] = []  # beside metrics.jsonl
    max_sources: int = Field(20, ge=0)  # of mixed data that have metrics of their own; 0: none
    project: str = "stepcredit"  # of Weights & Biases

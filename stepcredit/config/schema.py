"""One schema for every run: YAML file, then `--section.option value`, over the algorithm's and the recipe's defaults.

defaults here < the algorithm's (algorithms.py) < the recipe of the embedded model < YAML file < command line
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from stepcredit.estimators.options import CriticOptions, PrepareOptions, PRMOptions
from stepcredit.growth.options import GrowthOptions, PrefixValueOptions
from stepcredit.learn.options import LoraOptions, OptimOptions, PlacementOptions, TextOptions
from stepcredit.losses.options import ObjectiveOptions
from stepcredit.run.options import CheckpointOptions, EvalOptions, RolloutOptions, TrackOptions, TrainOptions
from stepcredit.samplers.options import SamplerOptions
from stepcredit.section import Choice, Place, Places, Section, split
from stepcredit.shaping.options import FilterOptions
from stepcredit.tasks.options import TaskOptions
from stepcredit.verifiers.options import RewardOptions

SUM = "sum"  # the name of a credit that is a sum of others


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class CreditTerm(BaseModel):
    """A credit function by name or dotted path, how it is added, and its own options."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    name: Place
    part: Literal["outcome", "process"] | None = None  # of the advantage; None: all of it
    weight: float = 1.0
    normalize: Literal["none", "batch", "group"] = "none"  # before the weight
    options: dict[str, Any] = {}  # the function's own, where they have the name of one of these

    @model_validator(mode="after")
    def _check(self) -> Self:
        both = self.options.keys() & (self.model_extra or {}).keys()
        if both:
            raise ValueError(f"{', '.join(sorted(both))} stands there twice, in options and beside them")
        if self.name == SUM:
            raise ValueError("a sum within a sum; write its terms here")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unchanged = type(self).model_fields.keys() - {"name", *self.how}
        return {name: value for name, value in write(self).items() if name not in unchanged}

    @property
    def how(self) -> dict[str, Any]:
        """What of the term is not as by default, its name and the function's own options left out."""
        fields = type(self).model_fields
        return {
            name: getattr(self, name)
            for name in fields
            if name != "name" and getattr(self, name) != fields[name].default
        }

    @property
    def label(self) -> str:
        """For people, without the sign of its weight: `0.5 spro.process`, with ` by group` where it is normalised."""
        part = f".{self.part}" if self.part else ""
        by = "" if self.normalize == "none" else f" by {self.normalize}"
        weight = "" if abs(self.weight) == 1 else f"{abs(self.weight):g} "
        return f"{weight}{re.split(r'[.:]', self.name)[-1]}{part}{by}"

    @property
    def own_options(self) -> dict[str, Any]:
        return {**(self.model_extra or {}), **self.options}


class CreditConfig(Choice):
    """A credit function by name or dotted path, and its own options; or a sum of several."""

    name: Place = "grpo"
    # [{name, weight 1, part outcome|process, normalize none|batch|group, and the function's own options}, ...]
    sum: Annotated[list[Annotated[CreditTerm, BeforeValidator(_named)]], Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_of_sum(cls, given: Any) -> Any:
        return {"name": SUM, **given} if isinstance(given, dict) and given.get("sum") is not None else given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.name == SUM) != (self.sum is not None):
            raise ValueError(
                "a credit named sum has a list of its terms: credit.sum '[{name: grpo}, {name: spro}]'"
                if self.sum is None
                else f"both name ('{self.name}') and sum are given; leave name out, it may be a term of the sum"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_empty_sum(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if name != "sum" or value is not None}

    @property
    def label(self) -> str:
        """For people: the name of the credit function, or the sum as a formula, `grpo + 0.5 spro.process`."""
        if self.sum is None:
            return self.name
        text = "".join(f" {'-' if term.weight < 0 else '+'} {term.label}" for term in self.sum)
        normalize = self.options.get("normalize", "none")
        text = text.removeprefix(" + ").lstrip()
        return text if normalize == "none" else f"({text}) by {normalize}"

    @property
    def names(self) -> list[str]:
        """Of the credit function, or of those that are summed."""
        return [self.name] if self.sum is None else [term.name for term in self.sum]


class LossConfig(Choice):
    """A loss by name or dotted path, and its own options."""

    name: Place = "clip"


def _shown(value: Choice) -> Any:
    return value.model_dump() if value.options else value.name


Named = Annotated[Choice, BeforeValidator(_named)]
Listed = Annotated[Choice, BeforeValidator(_named), PlainSerializer(_shown)]


class Config(Section):
    algorithm: str = "grpo"
    model: Place = "embedded"  # embedded | folder | hub id
    trust_remote_code: bool = False  # run code that comes with a hub model
    task: TaskOptions = TaskOptions()
    sampler: SamplerOptions = SamplerOptions()
    growth: GrowthOptions = GrowthOptions()
    reward: RewardOptions = RewardOptions()
    filter: FilterOptions = FilterOptions()
    shapers: Annotated[list[Listed], BeforeValidator(split)] = []  # in this order; names, or name and options
    credit: CreditConfig = CreditConfig()
    loss: LossConfig = LossConfig()
    objective: ObjectiveOptions = ObjectiveOptions()
    optim: OptimOptions = OptimOptions()
    ptx: TextOptions = TextOptions()
    # column -> dotted path of your builder, or a name and options
    # (old_logprobs: forward | sampler, token_rewards: log_ratio)
    estimators: dict[str, Named] = {}
    prm: PRMOptions = PRMOptions()
    prefix_values: PrefixValueOptions = PrefixValueOptions()
    prepare: PrepareOptions = PrepareOptions()
    critic: CriticOptions = CriticOptions()
    lora: LoraOptions = LoraOptions()
    distributed: PlacementOptions = PlacementOptions()
    train: TrainOptions = TrainOptions()
    eval: EvalOptions = EvalOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    rollouts: RolloutOptions = RolloutOptions()
    track: TrackOptions = TrackOptions()
    run_dir: Place | None = None  # None: runs/ALGORITHM-NUMBER
    code_folders: Places = []  # where code of your own is looked for, beside this folder and that of the config file

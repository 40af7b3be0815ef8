"""One schema for every run: YAML file, then `--section.option value`, over the algorithm's and the recipe's defaults.

defaults here < the algorithm's (algorithms.py) < the recipe of the embedded model < YAML file < command line
"""

from typing import Annotated, Any

from pydantic import BeforeValidator

from stepcredit.estimators.options import CriticOptions, PRMOptions
from stepcredit.growth.options import GrowthOptions
from stepcredit.learn.options import LoraOptions, OptimOptions, PlacementOptions
from stepcredit.losses.options import ObjectiveOptions
from stepcredit.run.options import CheckpointOptions, EvalOptions, RolloutOptions, TrackOptions, TrainOptions
from stepcredit.samplers.options import SamplerOptions
from stepcredit.section import Choice, Place, Places, Section
from stepcredit.shaping.options import FilterOptions
from stepcredit.tasks.options import TaskOptions
from stepcredit.verifiers.options import RewardOptions


class CreditConfig(Choice):
    """A credit function by name or dotted path, and its own options."""

    name: Place = "grpo"


class LossConfig(Choice):
    """A loss by name or dotted path, and its own options."""

    name: Place = "clip"


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Named = Annotated[Choice, BeforeValidator(_named)]


class Config(Section):
    algorithm: str = "grpo"
    model: Place = "embedded"  # embedded | folder | hub id
    trust_remote_code: bool = False  # run code that comes with a hub model
    task: TaskOptions = TaskOptions()
    sampler: SamplerOptions = SamplerOptions()
    growth: GrowthOptions = GrowthOptions()
    reward: RewardOptions = RewardOptions()
    filter: FilterOptions = FilterOptions()
    shapers: Places = []
    credit: CreditConfig = CreditConfig()
    loss: LossConfig = LossConfig()
    objective: ObjectiveOptions = ObjectiveOptions()
    optim: OptimOptions = OptimOptions()
    estimators: dict[
        str, Named
    ] = {}  # column -> dotted path of your builder, or name and options; old_logprobs: forward | sampler
    prm: PRMOptions = PRMOptions()
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

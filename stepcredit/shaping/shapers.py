"""The shapers by name. One row here for each; name your own by dotted path (`--shapers my_package.my_shaper`)."""

from stepcredit.shaping.base import ShapeFunction
from stepcredit.shaping.masks import drop_uniform, mask_truncated, positives_only
from stepcredit.shaping.rewards import (
    clip_rewards,
    outcome_gate,
    overlong,
    running_scale,
    shuffle_rewards,
    unlikeliness,
)

SHAPERS: dict[str, ShapeFunction] = {
    "mask_truncated": mask_truncated,
    "drop_uniform": drop_uniform,
    "positives_only": positives_only,
    "clip_rewards": clip_rewards,
    "running_scale": running_scale,
    "overlong": overlong,
    "unlikeliness": unlikeliness,
    "outcome_gate": outcome_gate,
    "shuffle_rewards": shuffle_rewards,
}

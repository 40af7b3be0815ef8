"""Which groups are trained on."""

from pydantic import Field

from stepcredit.section import Section


class FilterOptions(Section):
    enabled: bool = False
    low: float = 0.2  # smallest and largest mean reward of a group, both included
    high: float = 0.8
    drop_truncated: bool = False  # groups with a truncated completion do not pass
    oversample: float = Field(1.0, ge=1)  # problems sampled for each that is missing
    max_draws: float = Field(4.0, ge=1)  # problems sampled at most in an iteration, in multiples of the batch

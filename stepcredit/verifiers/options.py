"""What judges completions."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from stepcredit.section import Names, Numbers, Section

EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def numbers_in(value: Any) -> Any:
    """YAML reads `1e-6` as text; where no schema says what an option is, it is a number."""
    if isinstance(value, dict):
        return {name: numbers_in(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [numbers_in(inner) for inner in value]
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


class RewardOptions(Section):
    functions: Names = []  # empty: the task's own
    weights: Numbers = []  # empty: all 1
    options: Annotated[dict[str, Any], BeforeValidator(numbers_in)] = {}  # by function: further arguments
    kinds: dict[str, Names] = {}  # rows of mixed data, kind -> functions for them alone (numina*: math, apps: code)
    kind_column: str = "data_source"  # has the kind; reward.functions judge rows of all kinds
    skip_special_tokens: bool = True  # false: functions see <|...|> and the like, but for the stop token
    timeout_s: float = Field(10.0, gt=0)  # of a call; its worker process is killed then
    on_failure: Literal["drop", "zero", "raise"] = "drop"  # time-outs and errors: unjudged, reward 0, or the end
    call_with: Literal["row", "group", "batch"] = "row"  # completions that a call of your own function gets
    workers: int | None = Field(None, ge=0)  # None: by the cores; 0: calls in this process, without deadlines
    memory_mb: int = Field(4096, ge=0)  # address space of a worker; 0: no limit
    gold_check: int = Field(64, ge=0)  # rows whose gold answer must score before training starts; 0: none
    gold_threshold: float = Field(0.9, ge=0, le=1)  # share of them

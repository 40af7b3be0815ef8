"""What judges completions."""

from typing import Any, Literal

from pydantic import Field

from stepcredit.section import Numbers, Places, Section


class RewardOptions(Section):
    functions: Places = []  # empty: the task's own
    weights: Numbers = []  # empty: all 1
    options: dict[str, Any] = {}  # by function: further arguments
    kinds: dict[str, Places] = {}  # rows of mixed data, kind -> functions for them alone (numina*: math, apps: code)
    kind_column: str = "data_source"  # has the kind; reward.functions judge rows of all kinds
    skip_special_tokens: bool = True  # false: functions see <|...|> and the like, but for the stop token
    timeout_s: float = Field(10.0, gt=0)  # of a call; its worker process is killed then
    on_failure: Literal["drop", "zero", "raise"] = "drop"  # time-outs and errors: unjudged, reward 0, or the end
    call_with: Literal["row", "group", "batch"] = "row"  # completions that a call of your own function gets
    workers: int | None = Field(None, ge=0)  # None: by the cores; 0: calls in this process, without deadlines
    memory_mb: int = Field(4096, ge=0)  # address space of a worker; 0: no limit
    gold_check: int = Field(64, ge=0)  # rows whose gold answer must score before training starts; 0: none
    gold_threshold: float = Field(0.9, ge=0, le=1)  # share of them

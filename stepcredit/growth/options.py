"""How trees of completions grow."""

from typing import Literal

from pydantic import Field

from stepcredit.section import Names, Section


class StepOptions(Section):
    tokens: int | None = Field(None, ge=1)  # a step ends after so many tokens
    delimiters: Names = []  # ... or after a token that holds one: newline, sentence, task (the task's own) or a text


class GrowthOptions(Section):
    name: Literal["flat", "tree"] = "flat"
    group_size: int = Field(8, ge=1)  # flat
    num_branches: int = Field(8, ge=2)  # tree, as all that follows
    depth: int = Field(3, ge=1)
    step: StepOptions = StepOptions()
    mode: Literal["complete", "stepwise"] = "complete"  # whole completions that are cut, or step by step
    max_segments: int = Field(0, ge=0)  # of a tree; 0: no limit
    max_tokens: int = Field(0, ge=0)  # of a tree; 0: no limit

"""How trees of completions grow."""

from typing import Any, Literal

from pydantic import Field

from stepcredit.errors import UserError
from stepcredit.section import Names, Place, Section

RECORDED = ("pairs", "demonstrations")  # growths that take the completions of the data


class StepOptions(Section):
    tokens: int | None = Field(None, ge=1)  # a step ends after this many tokens
    delimiters: Names = []  # ... or after a token that holds one: newline, sentence, task (the task's own) or a text


class PrefixValueOptions(Section):
    num_rollouts: int = Field(9, ge=1)  # continuations from the start of every step
    step: StepOptions = StepOptions(delimiters=["task"])  # where a step ends
    max_steps: int = Field(0, ge=0)  # of a completion that are told apart, the last one takes the rest; 0: all
    start: Literal["rollouts", "group"] = "rollouts"  # value of the prompt: rollouts, or mean of the group's others
    eta: float = Field(0.0, ge=0)  # above 0: soft values 1 / eta log mean exp(eta r); 0: mean returns
    adaptive: float = Field(0.0, ge=0, lt=1)  # share of the rollouts that is drawn only where neighbouring steps vary
    max_tokens: int = Field(0, ge=0)  # budget of a batch, planned by how long its completions go on; 0: none
    model: Place | None = None  # that continues (a prover): folder | hub id; None: the policy


class TreeOptions(Section):
    num_branches: int = Field(8, ge=2)  # children of every node that is cut
    depth: int = Field(3, ge=1)  # segments of a path at most; the last one runs to the end of the completion
    step: StepOptions = StepOptions()
    mode: Literal["complete", "stepwise"] = "complete"  # whole completions that are cut, or step by step
    max_segments: int = Field(0, ge=0)  # of a tree; 0: no limit
    max_tokens: int = Field(0, ge=0)  # of a tree; 0: no limit


class GrowthOptions(TreeOptions):
    name: Place = "flat"  # flat | tree | pairs | demonstrations (docs/pairs.md) | dotted path of your own
    group_size: int = Field(8, ge=1)  # completions of a problem (flat); the options above are for trees
    options: dict[str, Any] = {}  # for a growth of your own

    @property
    def recorded(self) -> bool:
        """Whether completions and their rewards come from the data, so that nothing is sampled and judged."""
        return self.name in RECORDED

    def completions(self) -> int:
        """Most completions of a problem; of a growth of your own its `group_size`."""
        if self.recorded:
            return 2 if self.name == "pairs" else 1
        return self.num_branches**self.depth if self.name == "tree" else self.group_size

    def check(self, flat_credit: bool, credit: str, trees: str, depth_weights: int) -> None:
        """Refuse options that do not fit together.

        Args:
            flat_credit: the credit function, said to be `credit`, takes only flat forests.
            trees: names of credit functions for trees.
            depth_weights: the number of objective.depth_weights.
        """
        default = type(self)()
        branching = self.name == "tree"
        if branching and flat_credit:
            raise UserError(
                f"{credit} takes flat forests, growth.name is tree; take --growth.name flat, or a credit for "
                f"trees ({trees})"
            )
        if branching and self.group_size != default.group_size:
            raise UserError("growth.group_size is for flat growth; trees have --growth.num-branches and --growth.depth")
        if self.name == "flat" or self.recorded:
            for name in TreeOptions.model_fields:
                if getattr(self, name) != getattr(default, name):
                    raise UserError(
                        f"growth.{name} is for trees; set --growth.name tree, or an algorithm such as treerpo"
                    )
        if self.recorded and self.group_size != default.group_size:
            raise UserError(f"growth.group_size: growth.name {self.name} takes as many completions as the data have")
        if self.options and self.name in ("flat", "tree", *RECORDED):
            raise UserError(f"growth.options are for a growth of your own; growth.name is {self.name}")
        if branching and depth_weights and depth_weights != self.depth:
            raise UserError(
                f"objective.depth_weights: {depth_weights} numbers for {self.depth} depths; give one for each, from "
                "the prompt down"
            )

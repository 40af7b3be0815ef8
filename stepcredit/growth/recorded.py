"""Completions that the data have: preference pairs and demonstrations. Nothing is sampled, nothing judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stepcredit.forest import Forest
from stepcredit.forest.types import Problem, Segment, Tree
from stepcredit.samplers.base import Sampler
from stepcredit.samplers.params import SamplingParams
from stepcredit.tasks.prompts import CompletionTooLong, PromptFormat
from stepcredit.tasks.recorded import COMPLETIONS, REWARDS


@dataclass(frozen=True)
class Recorded:
    """A growth: the trees of rows that bring their completions (`tasks/recorded.py`), the prompt once in each.

    Attributes:
        encode: renders prompts, and completions behind them.
        stop: token ids that end a completion.
        max_tokens: of a completion at most.
    """

    encode: PromptFormat
    stop: Sequence[int]
    max_tokens: int

    def __call__(
        self,
        sampler: Sampler,
        problems: Sequence[Problem],
        encode: Callable[[Problem], list[int]],
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> Forest:
        return Forest.from_trees([self.tree(problem) for problem in problems])

    def tree(self, problem: Problem) -> Tree:
        """
        Raises:
            CompletionTooLong: a completion has more than `max_tokens`; it is never cut.
            PromptTooLong, UserError: as `PromptFormat`.
        """
        prompt = self.encode(problem)
        rows = [self.encode.completion(problem, prompt, each, self.stop) for each in problem.columns[COMPLETIONS]]
        longest = max(map(len, rows))
        if longest > self.max_tokens:
            raise CompletionTooLong(
                f"problem '{problem.id}': a completion has {longest} tokens, over the limit of {self.max_tokens}; "
                "raise it with --max-new-tokens or leave the row out"
            )
        rewards = problem.columns[REWARDS]
        return Tree(
            problem,
            prompt,
            [
                Segment(ids, reward=reward, rewards={}, finish="stop" if ids[-1] in self.stop else "length")
                for ids, reward in zip(rows, rewards, strict=True)
            ],
        )

    def prompt(self, problem: Problem) -> list[int]:
        """Token ids of the prompt, if all of the row fits."""
        return list(self.tree(problem).prompt_ids)

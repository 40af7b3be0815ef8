"""The example: the problem, or the completion, that is shown where none was asked for.

`stepcredit show` takes an example from the saved groups of an iteration, training from the rollouts that it has just
made.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from rich.console import Console
from rich.console import Group as Stack
from rich.text import Text

from stepcredit.display.console import is_plain
from stepcredit.display.groups import mark, range_of
from stepcredit.display.numbers import finite_numbers, least_and_largest
from stepcredit.display.shading import Shading, Tokens, one_line, shaded, step_means_line
from stepcredit.display.token_texts import TokenTexts
from stepcredit.forest.types import Segment, Tree

if TYPE_CHECKING:
    from stepcredit.display.rollouts import SavedGroup
    from stepcredit.forest import Forest

TEXT_LINES = 3  # of the completion; with the title, the question and the means of steps six lines in all
INDENT = 2


def example_group(groups: Sequence["SavedGroup"]) -> int:
    """The group to look at first: right and wrong completions if there is one, and advantages that lie far apart."""

    def contrast(place: int) -> tuple[bool, float]:
        low, high = least_and_largest(groups[place].columns.get("advantages", [])) or (0.0, 0.0)
        outcomes = {reward >= 1 for reward in groups[place].rewards}
        return len(outcomes) == 2, high - low

    return max(range(len(groups)), key=contrast)


def example_completion(forest: "Forest", num_trees: int) -> tuple[Tree, list[int]]:
    """Of the first trees the one whose advantages lie furthest apart, and of it the completion with the largest one.

    Returns:
        The tree, and the segments of the completion.
    """
    advantages = forest.token["advantages"].nan_to_num(0.0, 0.0, 0.0)
    tree_of = forest.segment["tree"][forest.token["segment"]]
    zeros = advantages.new_zeros(forest.num_trees)
    high = zeros.scatter_reduce(0, tree_of, advantages, "amax", include_self=False)
    low = zeros.scatter_reduce(0, tree_of, advantages, "amin", include_self=False)
    tree = forest.select_trees((high - low)[:num_trees].argmax().view(1)).to_trees()[0]
    paths: list[list[int]] = []
    for number, segment in enumerate(tree.segments):
        before = paths[segment.parent] if segment.parent >= 0 else []
        paths.append([*before, number])
    parents = {segment.parent for segment in tree.segments}
    largest = [max((abs(value or 0.0) for value in _advantages(segment)), default=0.0) for segment in tree.segments]
    completions = [path for number, path in enumerate(paths) if number not in parents]
    return tree, max(completions, key=lambda path: max(largest[number] for number in path))


def example_view(
    forest: "Forest", num_trees: int, iteration: int, token_texts: TokenTexts, delimiter: str, console: Console
) -> Stack:
    """The example of an iteration, shaded by its advantages, in at most six lines.

    Args:
        num_trees: the example is one of so many first trees.
        delimiter: text with which a step ends.
    """
    tree, path = example_completion(forest, num_trees)
    segments = [tree.segments[number] for number in path]
    tokens = _tokens(segments, token_texts, delimiter)
    bounds = least_and_largest([_advantages(segment) for segment in tree.segments]) or (0.0, 0.0)
    shading = Shading("advantage", max(map(abs, bounds)), is_plain(console))
    reward = segments[-1].reward
    facts = (
        "goes on" if segments[-1].finish == "open" else "unjudged" if reward is None else f"reward {reward:.2f}",
        one_line(tree.problem.id),
        f"{len(tokens.texts)} tokens",
        f"advantages {range_of(bounds)}",
    )
    title = Text(no_wrap=True, overflow="ellipsis").append(f"iteration {iteration} ", "bold")
    title.append_text(mark(reward)).append(f" {' · '.join(facts)}")
    return short_view(title, _question_text(tree), tokens, shading, console)


def _tokens(segments: Sequence[Segment], token_texts: TokenTexts, delimiter: str) -> Tokens:
    """The tokens of a completion; a step begins with a segment and after a delimiter."""
    texts = token_texts.of([token for segment in segments for token in segment.token_ids])
    starts = [0, *(place + 1 for place, text in enumerate(texts[:-1]) if delimiter in text)]
    starts += accumulate(len(segment.token_ids) for segment in segments[:-1])
    return Tokens(texts, [value for segment in segments for value in _advantages(segment)], starts)


def _advantages(segment: Segment) -> list[float | None]:
    return finite_numbers(None if segment.pruned else segment.columns["advantages"], len(segment.token_ids))


def _question_text(tree: Tree) -> str:
    """The question, the last message where it is a conversation."""
    question = tree.problem.question
    if isinstance(question, str):
        return question
    return str(question[-1].get("content", "")) if question else ""


def short_view(title: Text, question: str, tokens: Tokens, shading: Shading, console: Console) -> Stack:
    """One completion in at most six lines."""
    width = console.width - INDENT
    lines = [Text(one_line(question), "dim")]
    lines[0].truncate(width, overflow="ellipsis")
    text = shaded(tokens, shading, flat=True, limit=TEXT_LINES * width - 40)
    lines += _first_lines(text, console, width, TEXT_LINES)
    if means := step_means_line(tokens, shading):
        lines += _first_lines(means, console, width, 1)
    return Stack(title, *(Text(" " * INDENT).append_text(line) for line in lines))


def _first_lines(text: Text, console: Console, width: int, most: int) -> Iterator[Text]:
    lines = text.wrap(console, width)
    for place, line in enumerate(lines[:most]):
        line.rstrip()
        if place == most - 1 and len(lines) > most:
            line.truncate(width - 1)
            line.append("…", "dim")
        yield line

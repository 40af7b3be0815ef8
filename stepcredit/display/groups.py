"""The saved completions of a problem in the terminal, one below the other or as a tree, and a table of all problems."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from stepcredit.display.numbers import finite, finite_numbers, least_and_largest, mean, signed
from stepcredit.display.rollouts import SavedGroup
from stepcredit.display.shading import CLOSE, OPEN, Shading, Tokens, one_line, shaded, step_means_line, style_of
from stepcredit.display.token_texts import visible

RIGHT, WRONG, UNJUDGED = "✓", "✗", "?"
MARKS = {RIGHT: "right", WRONG: "wrong", UNJUDGED: "unjudged"}
INDENT = 4  # of completions below their heads
MAX_PROBLEMS = 24  # lines of the table


def mark(reward: float | None) -> Text:
    """The sign of a right, wrong or unjudged completion."""
    if reward is None:
        return Text(UNJUDGED, "bold")
    return Text(RIGHT, "bold green") if reward >= 1 else Text(WRONG, "bold red")


def marks(group: SavedGroup) -> Text:
    """The marks of all completions in a row."""
    return Text().join(mark(group.tree.segments[leaf].reward) for leaf in group.leaves)


def shading_of(group: SavedGroup, column: str, name: str, plain: bool) -> Shading:
    """Shades of a column, scaled by the largest number of the group."""
    bounds = least_and_largest(group.columns.get(column, [])) or (0.0, 0.0)
    return Shading(name, max(map(abs, bounds)), plain)


def tokens_of(group: SavedGroup, path: Sequence[int], column: str) -> Tokens:
    """The tokens of the segments on a path, one after the other."""
    texts: list[str] = []
    values: list[float | None] = []
    starts: list[int] = []
    wrong: list[int] = []
    rows = group.columns.get(column) or [None] * len(group.texts)
    for segment in path:
        starts += [len(texts) + start for start in group.steps[segment]]
        if (span := group.wrong[segment]) is not None:
            wrong += [len(texts) + end for end in span]
        texts += group.texts[segment]
        values += finite_numbers(rows[segment], len(group.texts[segment]))
    return Tokens(texts, values, starts, (min(wrong), max(wrong)) if wrong else None)


def is_branching(group: SavedGroup) -> bool:
    """Whether completions share tokens."""
    parents = [segment.parent for segment in group.tree.segments if segment.parent >= 0]
    return len(parents) != len(set(parents))


def select_leaves(group: SavedGroup, most: int) -> list[int]:
    """At most so many completions, taken from the right and the wrong ones in turn, in their own order."""
    leaves = group.leaves
    if len(leaves) <= most:
        return leaves
    rewards = {leaf: group.tree.segments[leaf].reward for leaf in leaves}
    right = [leaf for leaf in leaves if (rewards[leaf] or 0.0) >= 1]
    others = [leaf for leaf in leaves if leaf not in right]
    turns = [(turn, kind, leaf) for kind, few in enumerate((right, others)) for turn, leaf in enumerate(few)]
    return sorted(leaf for _, _, leaf in sorted(turns)[:most])


def group_view(group: SavedGroup, column: str, shading: Shading, most: int, width: int, lines: int | None) -> Stack:
    """The question, the answer and the completions of a problem, as a tree where they share tokens.

    Args:
        most: completions that are shown.
        width: of the console.
        lines: of a completion, about; None for all.
    """
    leaves = select_leaves(group, most)
    parts: list[RenderableType] = [Text(visible(group.question), "bold")]
    if group.tree.problem.answer is not None:
        parts.append(Text("answer ", "dim").append(one_line(str(group.tree.problem.answer)), "not dim"))
    parts.append(Text())
    if is_branching(group):
        parts.append(tree_view(group, column, shading, leaves))
    else:
        limit = None if lines is None else lines * (width - INDENT)
        for leaf in leaves:
            parts += completion_view(group, leaf, column, shading, limit)
    if more := len(group.leaves) - len(leaves):
        parts += [Text(f"{more} more (--completions {len(group.leaves)})", "dim"), Text()]
    if is_branching(group):
        parts.append(Text())
    return Stack(*parts, *legend(group, column, shading))


def completion_view(
    group: SavedGroup, leaf: int, column: str, shading: Shading, limit: int | None = None
) -> list[RenderableType]:
    """Its mark and facts, its shaded tokens, and the means of its steps."""
    tokens, segment = tokens_of(group, group.path(leaf), column), group.tree.segments[leaf]
    head = Text().append_text(mark(segment.reward)).append(f" {group.leaves.index(leaf) + 1}  ", "bold")
    head.append(_facts(group, leaf, tokens, shading), "dim")
    lines: list[RenderableType] = [head, Padding(shaded(tokens, shading, limit=limit), (0, 0, 0, INDENT))]
    means = step_means_line(tokens, shading)
    if means:
        lines.append(Padding(means, (0, 0, 0, INDENT)))
    return [*lines, Text()]


def _facts(group: SavedGroup, leaf: int, tokens: Tokens, shading: Shading) -> str:
    segment, average = group.tree.segments[leaf], mean(tokens.values)
    facts = [
        "goes on"
        if segment.finish == "open"
        else "unjudged"
        if segment.reward is None
        else f"reward {segment.reward:.2f}",
        f"{len(tokens.texts)} tokens",
    ]
    if average is not None:
        kind = "mean " if tokens.varies(shading.scale) else ""
        facts.append(f"{kind}{shading.name} {signed(average, shading.scale)}")
    if segment.finish == "length":
        facts.append("truncated")
    if segment.masked:
        facts.append("masked")
    if group.pruned[leaf]:
        facts.append("pruned")
    return " · ".join(facts)


def tree_view(group: SavedGroup, column: str, shading: Shading, leaves: Sequence[int]) -> Tree:
    """The segments above these leaves, each on a line that is cut to the width."""
    shown = {segment for leaf in leaves for segment in group.path(leaf)}
    rewards = group.rewards
    summary = f"mean reward {sum(rewards) / len(rewards):.2f} of {len(rewards)} leaves" if rewards else "unjudged"
    nodes = {-1: Tree(Text(summary, "dim"), guide_style="dim")}
    all_leaves = set(group.leaves)
    for number, segment in enumerate(group.tree.segments):
        if number in shown:
            label = _node_label(group, number, column, shading, number in all_leaves)
            nodes[number] = nodes[segment.parent].add(label)
    return nodes[-1]


def _node_label(group: SavedGroup, number: int, column: str, shading: Shading, is_leaf: bool) -> Text:
    """Reward of a leaf or value, mean of the column, marks, text."""
    tokens, segment = tokens_of(group, [number], column), group.tree.segments[number]
    label = Text(no_wrap=True, overflow="ellipsis")
    if is_leaf:
        label.append_text(mark(segment.reward)).append("" if segment.reward is None else f" {segment.reward:.2f}")
    elif (value := finite(group.values[number])) is not None:
        label.append(f"value {value:.2f}")
    if (average := mean(tokens.values)) is not None:
        label.append("  ").append(signed(average, shading.scale), style_of(average, shading.scale))
    if group.pruned[number]:
        label.append("  pruned", "italic")
    if segment.finish == "length":
        label.append("  truncated", "italic")
    if segment.finish == "open":
        label.append("  goes on", "italic")
    text = shaded(tokens, replace(shading, plain=False), flat=True)
    if group.pruned[number]:
        text.stylize("dim strike")
    return label.append("  ").append_text(text)


def legend(group: SavedGroup, column: str, shading: Shading) -> list[Text]:
    """What shades and marks mean, and what else tokens can be shaded by."""
    lines = [_scale(group, column, shading), Text("   ".join(_notes(group, column, shading)), "dim")]
    others = ", ".join(name for name in group.columns if name != column)
    if others:
        lines.append(Text(f"other columns: {others}", "dim"))
    return lines


def _scale(group: SavedGroup, column: str, shading: Shading) -> Text:
    """The shades of some numbers, of the signs that the column has."""
    bounds = least_and_largest(group.columns.get(column, []))
    if bounds is None:
        return Text().append("no numbers of tokens", "bold")
    low, high = bounds
    scale = Text().append(shading.name, "bold")
    for share in (-1.0, -0.5, 0.5, 1.0):
        if (share < 0 and low < 0) or (share > 0 and high > 0):
            value = share * shading.scale
            scale.append(" ").append(f" {signed(value, shading.scale)} ", style_of(value, shading.scale))
    if low < 0 and not shading.plain:
        scale.append("  below zero: underlined", "dim")
    return scale


def _notes(group: SavedGroup, column: str, shading: Shading) -> list[str]:
    present = {mark(group.tree.segments[leaf].reward).plain for leaf in group.leaves}
    notes = [f"{sign} {name}" for sign, name in MARKS.items() if sign in present]
    if any(group.wrong):
        notes.append(f"{OPEN}…{CLOSE} first wrong line")
    if is_branching(group):
        notes.append(f"value, mean {shading.name}, text")
    elif any(tokens_of(group, group.path(leaf), column).step_means(shading.scale) for leaf in group.leaves):
        notes.append("[…] mean of a step" if shading.plain else "… │ … means of steps")
    return notes


def problems_table(groups: Sequence[SavedGroup], most: int = MAX_PROBLEMS) -> Table:
    """A line for each problem."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", justify="right")
    table.add_column("problem", overflow="ellipsis", no_wrap=True, max_width=32)
    table.add_column("completions", overflow="ellipsis", no_wrap=True)
    table.add_column("reward", justify="right")
    table.add_column("advantages", no_wrap=True)
    for number, group in enumerate(groups[:most], 1):
        rewards, bounds = group.rewards, least_and_largest(group.columns.get("advantages", []))
        table.add_row(
            str(number),
            Text(one_line(group.tree.problem.id)),
            Text(f"{len(group.leaves):>2} ").append_text(marks(group)),
            f"{sum(rewards) / len(rewards):.2f}" if rewards else UNJUDGED,
            range_of(bounds) if bounds else "",
        )
    if len(groups) > most:
        table.add_row("", Text(f"{len(groups) - most} more"))
    return table


def range_of(bounds: tuple[float, float]) -> str:
    """Least and largest number, once where they are written the same."""
    size = max(map(abs, bounds))
    return " … ".join(dict.fromkeys(signed(bound, size) for bound in bounds))

"""`stepcredit show`: a run in the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from stepcredit.cli.arguments import split
from stepcredit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from stepcredit.display.rollouts import SavedGroup
    from stepcredit.display.runs import Run

HELP = """\
usage: stepcredit show RUN [--iteration N] [--problem ID] [--column NAME] [--completions N] [--metrics NAMES]

A run in the terminal: its curves, its health, its saved rollouts, and completions whose tokens are shaded by their
credit: blue above zero, orange and underlined below. A run that is under way, was killed or is damaged is shown as far
as it can be read.

  RUN                   folder of a run
  --iteration N         look into the rollouts of this iteration (the last saved one by default)
  --problem ID          one problem, by its id or its number from 1 on: its completions, or its tree
  --column NAME         what tokens are shaded by: advantages | process | logprobs | entropy | log_ratio |
                        prm_log_ratio | token_rewards | values | value_target | weights, those of them that
                        the run has saved
  --completions N       how many are shown, right and wrong ones in turn; 16 by default, 4 of the example
  --metrics NAMES       curves of these metrics instead, such as reward/mean,optim/grad_norm (docs/metrics.md)

Examples
  stepcredit show runs/grpo-1
  stepcredit show runs/grpo-1 --metrics reward/mean,optim/grad_norm
  stepcredit show runs/grpo-1 --iteration 20 --problem 3
  stepcredit show runs/spro-1 --problem train-0-624 --column process --completions 2"""
OPTIONS = {  # with an example each
    "iteration": "20",
    "problem": "1",
    "column": "process",
    "completions": "4",
    "metrics": "reward/mean,policy/entropy",
}
METRICS = (
    "reward/mean",
    "eval/accuracy",
    "eval/accuracy_greedy",
    "eval/loss",
    "pair/accuracy",
    "completion/length",
    "policy/entropy",
    "policy/kl_ref",
    "policy/kl_ref_update",
    "credit/std",
    "credit/process_ratio",
    "group/kept",
    "prm/auc",
    "critic/explained_variance",
)
COMPLETIONS, EXAMPLE_COMPLETIONS = 16, 4  # that are shown, of a problem that was asked for and of an example
EXAMPLE_LINES = 6  # about, of a completion of an example


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    path, given = _options(words)
    iteration, most = _whole_number(given, "iteration"), _whole_number(given, "completions")
    if most is not None and most < 1:
        raise UserError(f"--completions: {most} is less than 1")
    from stepcredit.display.console import replace_unencodable
    from stepcredit.display.runs import read_runs

    runs = read_runs([path])
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs[:8]) + (" ..." if len(runs) > 8 else "")
        raise UserError(f"'{path}' holds {len(runs)} runs; give one of them ({names})")
    run, console = runs[0], Console(highlight=False)
    replace_unencodable(console)
    if iteration is not None and iteration not in run.files:
        raise UserError(_not_saved(run, iteration))
    if "metrics" in given:
        _check_metrics(run, given["metrics"].split(","))
    rollouts_only = "problem" in given or iteration is not None
    saved, groups = _read(run, iteration)
    if rollouts_only and not groups:
        raise UserError(f"{run.path}: nothing to look into: {'; '.join(run.remarks)}")
    chosen, column = _choose(groups, given.get("problem")), given.get("column", "")
    column = _column(groups[chosen], column, f"{run.files[saved]}") if chosen is not None else column
    _print_heading(run, console)
    if not rollouts_only or "metrics" in given:
        _print_curves(run, console, given["metrics"].split(",") if "metrics" in given else None)
        _print_health(run, console)
    if chosen is not None:
        if "problem" not in given:
            _print_problems(run, saved, groups, console)
        _print_group(groups, chosen, saved, column, most, "problem" not in given, console)
    return 0


# ---------------------------------------------------------------------- what is asked for


def _options(words: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The run and the options."""
    runs, given = split(words, OPTIONS, "show")
    if len(runs) != 1:
        what = f"one run at a time, found {', '.join(runs)}" if runs else "the folder of a run is missing"
        raise UserError(f"show: {what}; for example 'stepcredit show runs/grpo-1'")
    return runs[0], given


def _whole_number(given: dict[str, str], name: str) -> int | None:
    try:
        return int(given[name]) if name in given else None
    except ValueError:
        raise UserError(f"--{name}: '{given[name]}' is not a whole number") from None


def _not_saved(run: "Run", iteration: int) -> str:
    near = sorted(run.files, key=lambda saved: abs(saved - iteration))
    more = " ..." if len(near) > 8 else ""
    others = f"saved are {', '.join(map(str, near[:8]))}{more}" if near else "none are"
    return f"--iteration: rollouts of {iteration} are not saved in {run.path}; {others} (--rollouts.every)"


def _check_metrics(run: "Run", names: Sequence[str]) -> None:
    present = {name for row in run.rows for name in row if run.column(name)[1]} - {"iteration", "seconds"}
    for name in names:
        if name not in present:
            hint = did_you_mean(name, present) if present else "metrics.jsonl has none yet"
            raise UserError(f"--metrics: '{name}' is not in {run.path / 'metrics.jsonl'}; {hint}")


def _read(run: "Run", iteration: int | None) -> tuple[int, list["SavedGroup"]]:
    """The groups of an iteration; without one, the last that can be read, and remarks on those that cannot."""
    from stepcredit.display.rollouts import read_groups
    from stepcredit.display.token_texts import token_texts_of

    if not run.files:
        return 0, []
    token_texts = token_texts_of(run)
    for saved in [iteration] if iteration is not None else sorted(run.files, reverse=True):
        try:
            groups = read_groups(run, saved, token_texts)
            if groups:
                return saved, groups
            raise UserError(f"{run.files[saved]}: holds no rollouts")
        except UserError as error:
            if iteration is not None:
                raise
            run.remarks.append(str(error))
    return 0, []


def _choose(groups: Sequence["SavedGroup"], problem: str | None) -> int | None:
    """The group that is shown: the one asked for, or an example."""
    from stepcredit.display.example import example_group
    from stepcredit.display.rollouts import find_group

    if not groups:
        return None
    if problem is None:
        return example_group(groups)
    wanted = find_group(groups, problem)
    return next(place for place, group in enumerate(groups) if group is wanted)


def _column(group: "SavedGroup", column: str, where: str) -> str:
    """The column that tokens are shaded by: the one asked for, or the first."""
    present = list(group.columns)
    asked = column if column in present else column.replace("-", "_")
    if not asked:
        return present[0] if present else "advantages"
    if asked not in present:
        hint = did_you_mean(asked, present) if present else "it has no numbers of tokens"
        raise UserError(f"--column: no '{column}' in {where}; {hint}")
    return asked


# ---------------------------------------------------------------------- what is shown


def _print_heading(run: "Run", console: Console) -> None:
    from stepcredit.display.shading import one_line

    last = run.rows[-1] if run.rows else {}
    wanted, tokens = run.config.get("train.iterations"), last.get("tokens/total")
    facts = [
        run.algorithm,
        str(run.config.get("task.data", "unknown task")),
        f"iteration {last.get('iteration', 0)}" + (f" of {wanted}" if wanted is not None else ""),
        f"{tokens:,.0f} tokens" if isinstance(tokens, (int, float)) else "",
        _duration(last.get("seconds", 0.0)),
    ]
    console.print(_labelled(f"{one_line(run.name)}  ", "bold", one_line(" · ".join(filter(None, facts)))))
    for remark in run.remarks:
        console.print(_labelled("remark: ", "bold yellow", one_line(remark)))


def _labelled(label: str, style: str, text: str) -> Text:
    return Text().append(label, style).append(text)


def _duration(seconds: float) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h of training" if hours else f"{minutes}:{rest:02d} min of training"


def _print_curves(run: "Run", console: Console, names: Sequence[str] | None) -> None:
    from stepcredit.display.curves import curves

    columns = {name: run.column(name) for name in names or METRICS}
    columns = {name: (places, values) for name, (places, values) in columns.items() if values}
    if columns:
        console.print()
        console.print(curves(columns, console.width))


def _print_health(run: "Run", console: Console) -> None:
    """The warnings that training gave, with their iterations."""
    from stepcredit.display.numbers import abbreviated
    from stepcredit.run.health import replay

    health = replay(run.rows)
    if not health.iterations:
        return
    console.print()
    if health.verdict:
        console.print(_labelled("warning: ", "bold yellow", health.verdict))
        return
    warned: dict[str, list[int]] = {}
    for iteration, name, _ in health.warnings:
        warned.setdefault(name, []).append(iteration)
    remarks = [f"{name} (iteration {abbreviated(iterations, 6)})" for name, iterations in warned.items()]
    if health.idle:
        remarks.append(f"{health.idle} of {health.iterations} iterations had no group with two different rewards")
    style = "bold yellow" if warned else "bold green"
    console.print(_labelled("health: ", style, "; ".join(remarks) or "nothing to remark"))


def _print_problems(run: "Run", iteration: int, groups: Sequence["SavedGroup"], console: Console) -> None:
    from stepcredit.display.groups import problems_table
    from stepcredit.display.numbers import abbreviated

    console.print()
    console.print(_labelled("saved rollouts: ", "bold", f"iterations {abbreviated(run.files)}"))
    console.print(Text(f"the {len(groups)} problems of iteration {iteration}", "dim"))
    console.print(problems_table(groups))


def _print_group(
    groups: Sequence["SavedGroup"],
    chosen: int,
    iteration: int,
    column: str,
    most: int | None,
    is_example: bool,
    console: Console,
) -> None:
    from stepcredit.display.console import is_plain
    from stepcredit.display.groups import group_view, is_branching, shading_of
    from stepcredit.display.rollouts import title_of
    from stepcredit.display.shading import one_line

    group = groups[chosen]
    shading = shading_of(group, column, title_of(column), is_plain(console))
    console.print()
    console.rule(
        Text(f"iteration {iteration} · problem {chosen + 1} of {len(groups)} · {one_line(group.tree.problem.id)}"),
        align="left",
        style="dim",
    )
    if most is None:
        most = EXAMPLE_COMPLETIONS if is_example and not is_branching(group) else COMPLETIONS
    lines = EXAMPLE_LINES if is_example else None
    console.print(group_view(group, column, shading, most, console.width, lines))

"""`stepcredit report`: runs as one page for the browser."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from stepcredit.cli.arguments import output_file, read_number, split
from stepcredit.display.runs import read_runs
from stepcredit.errors import UserError

if TYPE_CHECKING:
    from stepcredit.config import CreditConfig

HELP = """\
usage: stepcredit report RUN [RUN ...] [-o FILE] [--option value ...]

Writes one HTML file that opens from disk, without a network: curves of all runs (runs that differ by their seed alone
become a mean with a band), the saved rollouts with the credit of every token, trees, the same rollouts under other
credit functions, options and warnings. A folder that holds runs stands for all of them.

  -o, --out FILE       report.html by default
  --credits A,B,...    credit functions to compare, names or dotted paths; all that fit the rollouts by default; or a
                       list of names, credit with options and sums as 'stepcredit credit' takes them
  --max-mb X           room for saved rollouts, 10 by default; beyond it iterations are left out evenly, and it is said

Examples
  stepcredit report runs/grpo-1
  stepcredit report runs/grpo-1 runs/spro-1 -o grpo-spro.html
  stepcredit report runs --credits grpo,opo,spro
  stepcredit report runs --credits '[grpo, {sum: [grpo, {name: spro, weight: 0.5, part: process}]}]'"""

OPTIONS = {"out": "report.html", "credits": "grpo,opo", "max-mb": "20"}  # with an example each


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    places, given = split(words, OPTIONS, "report", {"-o": "out"})
    if not places:
        raise UserError("report: name at least one run folder, such as runs/grpo-1; see 'stepcredit report --help'")
    out = output_file({"out": given.get("out", "report.html")})
    assert out is not None
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out: '{out}' does not end in .html")
    max_mib = read_number({"max-mb": "10"} | given, "max-mb", above=0)
    runs = read_runs(places)
    from stepcredit.report.page import write_page

    console, started = Console(), time.monotonic()
    credits = _credits(given.get("credits", ""))
    with console.status("reading") as status:
        written = write_page(runs, Path(out), credits, max_mib, lambda what: status.update(f"reading {what}"))
    for run in runs:
        for remark in run.remarks:
            console.print(f"{run.name}: {remark}", markup=False, highlight=False, soft_wrap=True)
    for remark in written.remarks:
        console.print(remark, markup=False, highlight=False, soft_wrap=True)
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    console.print(
        f"{count} -> {out} ({written.size / 1e6:.1f} MB, {time.monotonic() - started:.0f}s)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _credits(text: str) -> "list[str | CreditConfig]":
    """Names with commas between, or a list in YAML of names and of what a config has under `credit`.

    Raises:
        UserError: it is no such list.
    """
    if not text.lstrip().startswith("["):
        return [name.strip() for name in text.split(",") if name.strip()]
    from stepcredit.config import parse_value, resolve

    credits: list[str | CreditConfig] = []
    items = parse_value(text, ["credits"])
    if not isinstance(items, list):
        raise UserError(f"--credits: '{text}' is no list; write '[grpo, {{sum: [grpo, {{name: spro, weight: 0.5}}]}}]'")
    for number, item in enumerate(items):
        if not isinstance(item, (str, dict)):
            raise UserError(f"--credits: {item!r} is neither a name nor credit with options")
        try:
            credits.append(item if isinstance(item, str) else resolve({"model": "none", "credit": item}).credit)
        except UserError as error:
            raise UserError(f"--credits, entry {number + 1}: {error}") from error
    return credits

"""What `stepcredit audit` shows and writes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from stepcredit.growth.prefix_values import Plan
    from stepcredit.report.agreement import Agreement, Number, Sizes
    from stepcredit.report.audit import Measured
    from stepcredit.report.gradients import GradientFit


def table(found: "Mapping[str, Agreement]", ceiling: "Agreement | None", counted: "Sizes") -> Table:
    shown = Table("credit", "rank", "rank within", f"sign of {counted.beyond_noise}", f"first of {counted.losing}")
    rows = dict(found) | ({"noise ceiling": ceiling} if ceiling else {})
    for place, (name, row) in enumerate(rows.items()):
        if ceiling and place == len(found):
            shown.add_section()
        numbers = row.rank, row.rank_within, row.sign, row.first_loss
        shown.add_row(name, *map(_cell, numbers, (False, False, True, True)))
    chance = next((row.chance for row in found.values() if row.chance is not None), None)
    if chance is not None:
        shown.add_row("random step", "", "", "", f"{chance:.0%}")
    return shown


def gradient_table(fits: "Mapping[str, GradientFit]") -> Table:
    from stepcredit.report.audit import CEILING

    shown = Table("policy gradient by", "cosine", "noise")
    for name, one in fits.items():
        if name == CEILING:
            shown.add_section()
        shown.add_row(name, _cell(one.cosine, False), "-" if one.noise is None else f"{one.noise:.1f}")
    return shown


def _cell(number: "Number", percent: bool) -> str:
    """A number and its interval."""
    if number.value is None:
        return "-"
    if number.low is None or number.high is None:
        return f"{number.value:.0%}" if percent else f"{number.value:.2f}"
    if percent:
        return f"{number.value:.0%} ({100 * number.low:.0f}-{100 * number.high:.0f})"
    return f"{number.value:.2f} ({number.low:.2f} {number.high:.2f})"


def numbers_of(
    settings: Mapping[str, Any],
    made: "Plan",
    count: Mapping[str, int],
    sizes: Mapping[str, int],
    found: "Mapping[str, Agreement]",
    ceiling: "Agreement | None",
    fits: "Mapping[str, GradientFit]",
    refused: Mapping[str, str],
    measured: "Measured",
) -> dict[str, Any]:
    """What --json gets."""
    from stepcredit.report.agreement import as_json

    completions = []
    for each, values in zip(measured.steps, measured.values, strict=True):
        advantages, errors = values.advantages()
        row = {"tree": each.tree, "leaf": each.leaf, "starts": each.starts, "reward": values.total}
        row |= {"values": [sum(part) / len(part) for part in values.returns]}
        completions.append(row | {"advantages": advantages.tolist(), "errors": errors.tolist()})
    return {
        "settings": settings,
        "sizes": {**sizes, "num_rollouts": made.num_rollouts, "every": made.every},
        "sampled_now": count,
        "credits": {name: as_json(row) for name, row in found.items()},
        "noise_ceiling": as_json(ceiling),
        "gradients": {name: {"cosine": vars(one.cosine), "noise": one.noise} for name, one in fits.items()},
        "refused": refused,
        "completions": completions,
    }

"""What a run says about its own health."""

import io

import pytest
from rich.console import Console

from stepcredit.health import WARN_AFTER, Health

FINE = {
    "reward/mean": 0.5,
    "credit/outcome_rms": 1.0,
    "group/unjudged": 0.0,
    "group/singleton": 0.0,
    "completion/masked": 0.0,
}


def told(*rows: dict[str, float]) -> tuple[bool, str]:
    """The verdict over these iterations, and everything that was printed."""
    out = io.StringIO()
    health = Health(Console(file=out, width=1000))
    for number, row in enumerate(rows, 1):
        health.observe(number, FINE | row)
    return health.verdict(), out.getvalue()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"reward/mean": 0.0}, ["every group had equal rewards", "the mean reward was 0", "known wrong answer"]),
        ({"group/unjudged": 1.0}, ["no completion was judged", "None"]),
        ({"group/singleton": 1.0}, ["single judged completion", "--group-size"]),
        ({"completion/masked": 1.0}, ["masked", "--shapers"]),
    ],
)
def test_an_idle_run_says_why(row: dict[str, float], words: list[str]) -> None:
    """The reason is the one that held all the time, and comes with a remedy."""
    fine, text = told(*[row | {"credit/outcome_rms": 0.0}] * 3)
    assert not fine
    assert "nothing was learnt: in all 3 iterations" in text
    assert [word for word in words if word not in text] == []


def test_a_run_with_any_credit_has_learnt() -> None:
    """Idle iterations in between are mentioned, not condemned."""
    fine, text = told({}, {"credit/outcome_rms": 0.0}, {})
    assert fine
    assert "1 of 3 iterations" in text


def test_idle_iterations_in_a_row_warn_while_the_run_goes_on() -> None:
    idle = {"credit/outcome_rms": 0.0}
    assert "nothing is being learnt" in told(*[idle] * WARN_AFTER)[1]
    assert "nothing is being learnt" not in told(*[*[idle] * (WARN_AFTER - 1), {}, idle])[1]


def test_dominating_process_credit_warns_with_a_remedy() -> None:
    """Once, after some iterations in a row."""
    text = told(*[{"credit/process_ratio": 2.0}] * (WARN_AFTER + 3))[1]
    assert text.count("process credit is larger than outcome credit") == 1
    assert "--credit.beta" in text
    assert "process credit" not in told(*[{"credit/process_ratio": 0.9}] * 20)[1]


def test_a_skipped_step_is_told() -> None:
    assert "gradient was not finite" in told({"optim/nonfinite": 0.5})[1]

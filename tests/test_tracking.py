"""What a run says about its own health."""

import io

import pytest
from rich.console import Console

from stepcredit.run.clock import Pace
from stepcredit.run.health import ALARMS, WARN_AFTER, Health

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
    assert "health: 1 of 3 iterations" in text
    assert "health: nothing to remark" in told({}, {})[1]


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


def test_siblings_that_never_differ_are_told() -> None:
    """Not at once: at a low accuracy a batch without a right completion is chance, as a batch of equal groups is."""
    alike = {"group/kept": 0.0}
    assert "no group of siblings had values" in told(*[alike] * WARN_AFTER)[1]
    assert "warning" not in told(*[*[alike] * (WARN_AFTER - 1), {}, alike])[1]


def test_problems_that_all_fall_away_are_told_at_once() -> None:
    """By the prompt filter, with its reasons."""
    shares = {"filter/passed": 0.0, "filter/problems": 64.0, "filter/hard": 0.75, "filter/truncated": 0.25}
    assert "none of 64 problems passed the prompt filter (75% too hard, 0% too easy, 25% truncated)" in told(shares)[1]
    assert "warning" not in told({"filter/passed": 0.1})[1]


def test_a_reward_model_that_skips_its_step_is_told() -> None:
    assert "gradient of the process reward model was not finite" in told({"prm/nonfinite": 0.25})[1]


USUAL = {"policy/entropy": 1.0, "completion/length": 100.0, "completion/truncated": 0.1, "policy/kl_ref": 0.01}
TROUBLE = {
    "entropy collapsed": ({"policy/entropy": 0.05}, "--learning-rate"),
    "length exploded": ({"completion/length": 201.0}, "--objective.aggregate"),
    "completions truncated": ({"completion/truncated": 0.6}, "--sampler.max-new-tokens"),
    "policy far from reference": ({"policy/kl_ref": 1.5}, "--objective.kl.coef"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_that_lasts_is_told_with_a_remedy(name: str) -> None:
    """After some iterations in a row, once; again after it had ceased; and in the health line."""
    bad, remedy = TROUBLE[name]
    once = told(USUAL, *[USUAL | bad] * (WARN_AFTER + 4))[1]
    assert once.count("warning") == 1 and remedy in once and f"health: {name}" in once
    assert "warning" not in told(USUAL, *[USUAL | bad] * (WARN_AFTER - 1), USUAL)[1]
    twice = told(USUAL, *[USUAL | bad] * WARN_AFTER, USUAL, *[USUAL | bad] * WARN_AFTER)[1]
    assert twice.count("warning") == 2 and f"health: {name} (2x)" in twice


def test_every_option_that_a_remedy_names_exists() -> None:
    """No alarm sends a user to an option that there is not."""
    import re

    from stepcredit.cli.arguments import parse
    from stepcredit.config import resolve

    now = USUAL | FINE | {"credit/process_ratio": 2.0, "sampler/logprob_diff": 1.0}
    for alarm in ALARMS.values():
        for option in re.findall(r"--[a-z][a-z.-]+", alarm.say(now, now)):
            value = {"--shapers": "mask_truncated", "--credit.uniform": "drop", "--train.dtype": "float32"}.get(option)
            value = "zero" if option == "--reward.on-failure" else value
            value = value or ("token_mean" if option == "--objective.aggregate" else "1")
            algorithm = ["--algorithm", "spro"] if option.startswith("--credit") else []
            given, _ = parse([*algorithm, option.rstrip("."), value], {}, "train")
            resolve(given)


def test_a_sampler_that_disagrees_is_told_at_once() -> None:
    assert "are their weights the same?" in told(USUAL | {"sampler/logprob_diff": 0.7})[1]


def test_numbers_that_were_not_finite_alarm_nobody_falsely() -> None:
    """Read back from metrics.jsonl they are None."""
    row = USUAL | {"policy/entropy": None, "sampler/logprob_diff": None, "policy/kl_ref": None}
    assert "warning" not in told(USUAL, *[row] * (WARN_AFTER + 1))[1]
    absent = {name: value for name, value in USUAL.items() if name != "policy/kl_ref"}
    assert "warning" not in told(*[absent] * (WARN_AFTER + 1))[1]


def test_the_time_left_counts_iterations_and_evaluations_apart() -> None:
    """A first evaluation of 100 s is not the time of an iteration."""
    pace = Pace(last=10, eval_every=5)
    pace.add(0, 100.0, 100.0)
    assert pace.left(0) == 200.0  # two evaluations to come; of iterations nothing is known
    pace.add(1, 102.0, None)
    assert pace.left(1) == 9 * 2.0 + 200.0
    for iteration in (2, 3, 4):
        pace.add(iteration, 100.0 + 2 * iteration, None)
    pace.add(5, 170.0, 60.0)  # two seconds of it are the iteration
    assert pace.left(5) == 5 * 2.0 + 80.0
    assert pace.left(10) == 0.0


@pytest.mark.parametrize(("every", "evaluations"), [(0, 1), (3, 3), (7, 2), (10, 1), (4, 3)])
def test_evaluations_that_are_left(every: int, evaluations: int) -> None:
    """After iteration 3 of 10, the last one always among them."""
    pace = Pace(10, every)
    pace.add(0, 1.0, 1.0)
    assert pace.left(3) == evaluations

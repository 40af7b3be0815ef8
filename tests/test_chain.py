"""The embedded task: problems, the line checker, the verifier, and the faults that demonstrations have."""

import random
import re

import pytest

from stepcredit.demo.chain import (
    DISTRACTORS,
    LEVELS,
    MAX_VALUE,
    NAMES,
    WORDS,
    apply,
    check_lines,
    final_answer,
    generate,
    parse,
    problems,
    verify,
)
from stepcredit.demo.demonstrations import Demonstrator
from stepcredit.demo.task import EmbeddedTask

QUESTION = "Ivy = 14 . Mia = Ivy - 1 . Jim = Ivy * 2 . Fay = Mia + 5 . Fay ?"
LINES = ["Mia = Ivy - 1 = 14 - 1 = 13 .", "Fay = Mia + 5 = 13 + 5 = 18 ."]


def chains(count: int, seed: int = 0):
    rng = random.Random(seed)
    return [generate(rng, rng.choice(LEVELS), rng.choice(DISTRACTORS)) for _ in range(count)]


def judged(completion: str, answer: str = "18") -> float:
    return verify(["q"], [completion], [answer])[0]


# ---------------------------------------------------------------------- problems


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("distractors", DISTRACTORS)
def test_generated_problems_are_well_formed(level, distractors):
    """Counts as asked for, values in range and right, sources above their uses, the asked step last, known words."""
    rng = random.Random(f"{level}/{distractors}")
    for _ in range(60):
        chain = generate(rng, level, distractors)
        first, *rest = chain.steps
        assert (len(rest), sum(step.needed for step in rest)) == (level + distractors, level)
        assert first.needed and not first.source and 1 <= first.value <= MAX_VALUE
        assert len({step.name for step in chain.steps}) == len(chain.steps)
        known = {first.name: first.value}
        for step in rest:
            assert step.value == apply(known[step.source], step.operator, step.operand)
            assert 0 <= step.value <= MAX_VALUE
            known[step.name] = step.value
        assert chain.steps[-1].needed and chain.asked is chain.steps[-1]
        assert chain.values == known
        assert set(f"{chain.question()} {chain.solution()}".split()) <= set(WORDS)


def test_question_parses_back():
    for chain in chains(200):
        assert parse(chain.question()) == chain
        assert parse(f"<bos> {chain.question()}") == chain


def test_problem_columns():
    """Level, distractors and a solution stand beside the answer, for verifiers and statistics."""
    for problem in problems("train", 0, 100):
        chain = parse(problem.question)
        assert problem.answer == str(chain.asked.value) == problem.columns["solution"].split()[-1]
        assert problem.columns["level"] in LEVELS and problem.columns["distractors"] in DISTRACTORS
        assert len(chain.steps) == 1 + problem.columns["level"] + problem.columns["distractors"]


def test_splits_are_repeatable_and_differ():
    """The same numbers give the same problems; split, seed and offset each change them."""
    train = problems("train", 0, 50)
    assert train == problems("train", 0, 50)
    assert train[20:30] == problems("train", 0, 10, offset=20)
    others = [problems("held_out", 0, 50), problems("train", 1, 50), problems("train", 0, 50, offset=50)]
    for other in others:
        assert len({p.question for p in train} & {p.question for p in other}) < 5
        assert not {p.id for p in train} & {p.id for p in other}


def test_task_trains_by_seed_and_evaluates_alike():
    """Training problems follow from the seed; all seeds share the held-out ones."""
    one, two = EmbeddedTask(1), EmbeddedTask(2)
    assert one.draw(0, 5) + one.draw(5, 5) == one.draw(0, 10) != two.draw(0, 10)
    assert one.held_out(20) == two.held_out(20) == one.held_out(30)[:20]
    assert not {p.id for p in one.draw(0, 100)} & {p.id for p in one.held_out(100)}


# ---------------------------------------------------------------------- judging


def test_solution_is_right_everywhere():
    """The generated solution passes every line check and the verifier."""
    for chain in chains(200, seed=1):
        checks = check_lines(chain.question(), chain.solution())
        assert len(checks) == sum(step.needed for step in chain.steps)  # each needed line, and the answer
        assert all(check.ok and not check.reason for check in checks)
        assert judged(chain.solution(), str(chain.asked.value)) == 1.0


@pytest.mark.parametrize(
    "completion, reward",
    [
        (" ".join(LINES) + " #### 18", 1), ("#### 18", 1), ("#### 18 \n", 1), ("#### 17 . #### 18", 1),
        ("#### 18 .", 0), ("#### 18 Mia", 0), ("#### 18 #### 17", 0), ("#### 1", 0), ("#### 118", 0), ("18", 0),
        ("####", 0), ("#### Mia", 0), ("####18", 0), ("#### 1 8", 0), (" ".join(LINES), 0), ("", 0),
    ],
)  # fmt: skip
def test_verify_wants_the_answer_at_the_end(completion, reward):
    assert judged(completion) == reward
    assert (final_answer(completion) == "18") == bool(reward)


def test_verify_answers_each_completion():
    assert verify(["a", "b"], ["#### 3", "#### 4"], ["3", "3"]) == [1.0, 0.0]


def substituted(line: str, change) -> str:
    """The line with `change(value, operator, operand)` in its substitution."""
    return re.sub(r"= (\d+) (.) (\d+) =", lambda m: f"= {change(int(m[1]), m[2], int(m[3]))} =", line)


CORRUPTIONS = {
    "copied operator": lambda line: re.sub(
        r"^(\w+ = \w+) (.)", lambda m: f"{m[1]} {'-' if m[2] == '+' else '+'}", line
    ),
    "copied operand": lambda line: re.sub(r"^(\w+ = \w+ .) (\d+)", lambda m: f"{m[1]} {int(m[2]) + 1}", line),
    "source name": lambda line: re.sub(r"^(\w+) = \w+", r"\1 = \1", line),
    "defined name": lambda line: re.sub(r"^\w+", next(name for name in NAMES if name not in line), line),
    "substituted value": lambda line: substituted(line, lambda a, o, b: f"{a + 1} {o} {b}"),
    "operator": lambda line: substituted(line, lambda a, o, b: f"{a} {'-' if o == '+' else '+'} {b}"),
    "operand": lambda line: substituted(line, lambda a, o, b: f"{a} {o} {b + 1}"),
    "result": lambda line: re.sub(r"= (\d+) \.$", lambda m: f"= {int(m[1]) + 1} .", line),
    "no result": lambda line: re.sub(r" = (\d+) \.$", " .", line),
    "only the name": lambda line: line.split()[0] + " .",
    "result twice": lambda line: re.sub(r"= (\d+) \.$", r"= \1 = \1 .", line),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corrupted_line_is_the_first_wrong_one(kind):
    """Whatever is wrong in one line, that line and no other is named, with a reason."""
    rng = random.Random(kind)
    for chain in chains(60, seed=2):
        lines = [f"{line.strip()} ." for line in chain.solution().split(" #### ")[0].split(" .") if line]
        place = rng.randrange(len(lines))
        corrupted = CORRUPTIONS[kind](lines[place])
        assert corrupted != lines[place]
        text = " ".join([*lines[:place], corrupted, *lines[place + 1 :]]) + f" #### {chain.asked.value}"
        checks = check_lines(chain.question(), text)
        assert [index for index, check in enumerate(checks) if not check.ok] == [place]
        assert checks[place].reason and checks[place].text == corrupted.removesuffix(" .")


@pytest.mark.parametrize("end", [" #### 19", " ####", "", " #### 18 19"])
def test_wrong_answer_is_the_last_check(end):
    checks = check_lines(QUESTION, " ".join(LINES) + end)
    assert [check.ok for check in checks] == [True, True, False]
    assert checks[-1].reason == "the answer is 18"


@pytest.mark.parametrize("line", ["Ivy = 14 .", "check Mia = 13 .", "Mia = Ivy - 1 = 13 .", "Jim = Ivy * 2 = 28 ."])
def test_other_right_lines(line):
    """Repeated values, checks, terse lines and lines that were not needed are right when they are true."""
    assert all(check.ok for check in check_lines(QUESTION, " ".join([LINES[0], line, LINES[1]]) + " #### 18<eos>"))


@pytest.mark.parametrize("line", ["Ivy = 13 .", "check Mia = 14 .", "Mia = Ivy - 1 = 14 .", "Zoe = 3 ."])
def test_other_wrong_lines(line):
    checks = check_lines(QUESTION, " ".join([LINES[0], line, LINES[1]]) + " #### 18")
    assert checks[0].ok and not checks[1].ok


# ---------------------------------------------------------------------- demonstrations


@pytest.mark.parametrize("seed", range(3))
def test_demonstrations_stay_in_the_vocabulary(seed):
    """Every demonstration can be written with the words of the task, so its values are in range, and has an answer."""
    rng = random.Random(seed)
    for chain in chains(300, seed=seed):
        text = Demonstrator().solve(chain, rng)
        assert set(text.split()) <= set(WORDS)
        assert final_answer(text) is not None


def test_demonstrator_without_faults_is_right():
    careful = Demonstrator(misconceptions=(), careless=0.0)
    rng = random.Random(0)
    for chain in chains(200, seed=3):
        text = careful.solve(chain, rng)
        assert all(check.ok for check in check_lines(chain.question(), text))
        assert judged(text, str(chain.asked.value)) == 1.0


@pytest.mark.parametrize("true, taken_for, share", Demonstrator().misconceptions)
def test_misconceptions_appear_at_their_rate(true, taken_for, share):
    """In lines where the wrong result can be written down, the operator is mistaken as often as stated."""
    writer, rng = Demonstrator(styles=(0.0, 1.0, 0.0), careless=0.0), random.Random(0)
    mistaken = total = 0
    for chain in chains(1500, seed=4):
        for line in writer.solve(chain, rng).split(" ####")[0].split(" ."):
            match = re.fullmatch(r"\w+ = \w+ (.) (\d+) = (\d+) (.) (\d+) = (\d+)", line.strip())
            if match and match[1] == true and apply(int(match[3]), taken_for, int(match[5])) <= MAX_VALUE:
                total += 1
                mistaken += match[4] == taken_for
                assert match[4] in (true, taken_for)
    assert total > 600
    assert mistaken / total == pytest.approx(share, abs=4 * (share * (1 - share) / total) ** 0.5)


def test_slips_are_as_rare_as_stated():
    """Without misconceptions, wrong first lines come at no more than careless x slip, and at more than half of it."""
    writer, rng = Demonstrator(styles=(0.0, 1.0, 0.0), misconceptions=()), random.Random(0)
    made = chains(2000, seed=5)
    wrong = sum(not check_lines(chain.question(), writer.solve(chain, rng))[0].ok for chain in made)
    assert 0.5 * 0.4 * 0.25 < wrong / len(made) < 1.2 * 0.4 * 0.25

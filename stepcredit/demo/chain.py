"""The embedded task "chain": follow a chain of definitions to the value that is asked for.

A problem (2 needed steps, 1 distractor) and a right solution, every line of which can be checked:

    Ivy = 14 . Mia = Ivy - 1 . Jim = Ivy * 2 . Fay = Mia + 5 . Fay ?
    Mia = Ivy - 1 = 14 - 1 = 13 . Fay = Mia + 5 = 13 + 5 = 18 . #### 18

Difficulty has two axes: the number of needed steps (level) and of definitions that do not matter (distractors).
Whoever wrote the demonstrations that the embedded model learnt from takes `*` for `+` more often than not, and `-` for
`+` now and then (`demo/demonstrations.py`). So the model's greedy answer is wrong wherever the chain needs a product,
while its samples are sometimes right: room to learn for greedy and for sampled accuracy.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from stepcredit.forest.types import Problem

NAMES = [
    "Amy",
    "Ben",
    "Cat",
    "Dan",
    "Eva",
    "Fay",
    "Gus",
    "Hal",
    "Ivy",
    "Jim",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Ola",
    "Pam",
    "Ray",
    "Sue",
    "Tom",
    "Una",
]
MAX_VALUE = 24
OPERATORS = "+-*"
SPECIALS = ("<pad>", "<bos>", "<eos>")
WORDS = (*SPECIALS, *NAMES, *map(str, range(MAX_VALUE + 1)), *OPERATORS, "=", ".", "?", "####", "check")

LEVELS = (2, 3, 4, 5)
DISTRACTORS = (0, 1, 2)


@dataclass(frozen=True)
class Step:
    """The definition `name = source operator operand`; `source` is empty for a plain number."""

    name: str
    source: str
    operator: str
    operand: int
    value: int
    needed: bool

    def statement(self) -> str:
        if not self.source:
            return f"{self.name} = {self.value}"
        return f"{self.name} = {self.source} {self.operator} {self.operand}"


@dataclass(frozen=True)
class Chain:
    """A problem: definitions in reading order, the last needed one is asked for."""

    steps: tuple[Step, ...]

    @property
    def values(self) -> dict[str, int]:
        return {step.name: step.value for step in self.steps}

    @property
    def asked(self) -> Step:
        return [step for step in self.steps if step.needed][-1]

    def question(self) -> str:
        return " ".join(f"{step.statement()} ." for step in self.steps) + f" {self.asked.name} ?"

    def solution(self) -> str:
        lines = [
            explicit_line(step, self.values[step.source], step.value)
            for step in self.steps
            if step.source and step.needed
        ]
        return " ".join(lines) + f" #### {self.asked.value}"

    def problem(self, id: str) -> Problem:
        needed = sum(step.needed for step in self.steps) - 1
        columns = {"level": needed, "distractors": len(self.steps) - 1 - needed, "solution": self.solution()}
        return Problem(self.question(), str(self.asked.value), id, columns)


def apply(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def explicit_line(step: Step, source: int, value: int, operator: str | None = None) -> str:
    return f"{step.statement()} = {source} {operator or step.operator} {step.operand} = {value} ."


def generate(rng: random.Random, level: int, distractors: int) -> Chain:
    """A random problem with `level` needed steps and `distractors` further definitions."""
    names = rng.sample(NAMES, level + distractors + 1)
    needed = [True] * level + [False] * distractors
    rng.shuffle(needed)
    needed[-1] = True  # a distractor after the last needed step would give the answer's place away
    needed = [True, *_keep_count(needed, level)]
    start = rng.randint(1, MAX_VALUE)
    steps = [Step(names[0], "", "", 0, start, True)]
    for name, is_needed in zip(names[1:], needed[1:], strict=True):
        on_path = [step for step in steps if step.needed]
        source = on_path[-1] if is_needed else rng.choice(on_path)
        operator, operand = rng.choice(_fitting(source.value))
        steps.append(Step(name, source.name, operator, operand, apply(source.value, operator, operand), is_needed))
    return Chain(tuple(steps))


def _keep_count(needed: list[bool], level: int) -> list[bool]:
    """After the last entry was forced to True, turn another one off so that `level` remain."""
    if sum(needed) > level:
        needed[needed.index(True)] = False
    return needed


def _fitting(value: int) -> list[tuple[str, int]]:
    """Operations whose result stays in range, nine for each operator that can be used: each is chosen equally often."""
    operator_pairs = {
        "+": [("+", operand) for operand in range(1, 10) if value + operand <= MAX_VALUE],
        "-": [("-", operand) for operand in range(1, 10) if value - operand >= 0],
        "*": [("*", operand) for operand in (2, 3) if 0 < value * operand <= MAX_VALUE],
    }
    return [pair for pairs in operator_pairs.values() if pairs for pair in islice(cycle(pairs), 9)]


def problems(split: str, seed: int, count: int, offset: int = 0) -> list[Problem]:
    """Problems number `offset` .. `offset + count` of a split; the splits never share a seed."""
    made = []
    for index in range(offset, offset + count):
        rng = random.Random(f"chain/{split}/{seed}/{index}")
        made.append(generate(rng, rng.choice(LEVELS), rng.choice(DISTRACTORS)).problem(f"{split}-{seed}-{index}"))
    return made


# ---------------------------------------------------------------------- judging


def final_answer(completion: str) -> str | None:
    """The number after the last `####`, None when there is none."""
    match = re.search(r"#### (\d+)\s*$", completion)
    return match.group(1) if match else None


def verify(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **columns: Any) -> list[float]:
    """1 where the completion ends in `#### ANSWER` with the right answer, else 0."""
    return [float(final_answer(text) == str(right)) for text, right in zip(completions, answer, strict=True)]


def gold(problem: Problem) -> str | None:
    """The shortest completion that is right."""
    return None if problem.answer is None else f"#### {problem.answer}"


@dataclass(frozen=True)
class LineCheck:
    """One line of a solution: its text, whether it is right, and what is wrong otherwise."""

    text: str
    ok: bool
    reason: str = ""


def check_lines(question: str, completion: str) -> list[LineCheck]:
    """Check every line of a solution against the definitions of the question.

    A line is right when it copies a definition, puts the true value of its source in and states the true result. Lines
    that only repeat a value (`Ivy = 14 .`, `check Mia = 13 .`) are right when the value is.
    """
    chain = parse(question)
    text = completion.replace("<eos>", "").strip()
    body, _, answer = text.partition("####")
    checks = [_check_line(line.strip(), chain) for line in body.split(" .") if line.strip()]
    right = answer.strip() == str(chain.asked.value)
    checks.append(LineCheck(f"#### {answer.strip()}", right, "" if right else f"the answer is {chain.asked.value}"))
    return checks


def _check_line(line: str, chain: Chain) -> LineCheck:
    words = line.removeprefix("check ").split(" = ")
    step = next((step for step in chain.steps if step.name == words[0]), None)
    if step is None:
        return LineCheck(line, False, f"'{words[0]}' is not defined")
    if len(words) == 2:
        right = [step.name, str(step.value)]
    else:
        source = chain.values.get(step.source, 0)
        right = [step.name, f"{step.source} {step.operator} {step.operand}"]
        if len(words) > 3:
            right.append(f"{source} {step.operator} {step.operand}")
        right.append(str(step.value))
    for got, want in zip(words, right, strict=False):
        if got != want:
            return LineCheck(line, False, f"'{got}' should be '{want}'")
    if len(words) != len(right):
        return LineCheck(line, False, "the line has another form")
    return LineCheck(line, True)


def parse(question: str) -> Chain:
    """The chain of a question as `Chain.question` writes it."""
    *definitions, asked = [part.strip() for part in question.replace("<bos>", "").split(" .")]
    steps: dict[str, Step] = {}
    for definition in definitions:
        name, right = definition.split(" = ")
        words = right.split()
        if len(words) == 1:
            steps[name] = Step(name, "", "", 0, int(words[0]), False)
        else:
            source, operator, operand = words
            value = apply(steps[source].value, operator, int(operand))
            steps[name] = Step(name, source, operator, int(operand), value, False)
    needed, name = set(), asked.split()[0]
    while name:
        needed.add(name)
        name = steps[name].source
    ordered = [Step(s.name, s.source, s.operator, s.operand, s.value, s.name in needed) for s in steps.values()]
    return Chain(tuple(ordered))

"""Worked solutions of the chain task with human faults: what the embedded base model learns from."""

import random
from dataclasses import dataclass

from stepcredit.demo.chain import MAX_VALUE, Chain, Step, apply, explicit_line


@dataclass(frozen=True)
class Demonstrator:
    """How the writers of demonstrations work.

    Attributes:
        styles: shares of verbose (every definition, and checks), explicit (needed lines) and terse (no substitution).
        misconceptions: operator -> (operator it is taken for, how often).
        careless: share of solutions written carelessly; slip: chance of a slip in each line of those.
    """

    styles: tuple[float, float, float] = (0.2, 0.7, 0.1)
    misconceptions: tuple[tuple[str, str, float], ...] = (("-", "+", 0.3), ("*", "+", 0.6))
    careless: float = 0.4
    slip: float = 0.25

    def solve(self, chain: Chain, rng: random.Random) -> str:
        """One solution; wrong values are carried on, as people do."""
        style = rng.choices(("verbose", "explicit", "terse"), self.styles)[0]
        slip = self.slip if rng.random() < self.careless else 0.0
        believed = {chain.steps[0].name: chain.steps[0].value}
        lines = [f"{chain.steps[0].statement()} ."] if style == "verbose" else []
        for step in chain.steps[1:]:
            if not step.needed and style != "verbose":
                continue
            source = believed[step.source]
            operator, operand, value = self._work_out(step, source, slip, rng)
            believed[step.name] = value
            if style == "terse":
                lines.append(f"{step.statement()} = {value} .")
            else:
                written = Step(step.name, step.source, step.operator, step.operand, value, step.needed)
                line = explicit_line(written, source, value, operator)
                lines.append(line if operand == step.operand else _with_operand(line, operand))
            if style == "verbose" and rng.random() < 0.3:
                lines.append(f"check {step.name} = {value} .")
        return " ".join(lines) + f" #### {believed[chain.asked.name]}"

    def _work_out(self, step: Step, source: int, slip: float, rng: random.Random) -> tuple[str, int, int]:
        """Operator and operand as written in the substitution, and the value as stated."""
        operator, operand = step.operator, step.operand
        for true, taken_for, share in self.misconceptions:
            if operator == true and rng.random() < share:
                operator = taken_for
                break
        kind = rng.choice(("operator", "operand", "result")) if rng.random() < slip else ""
        if kind == "operator":
            operator = rng.choice([other for other in "+-*" if other != operator])
        if kind == "operand":
            operand = rng.randint(1, 9)
        value = apply(source, operator, operand)
        if kind == "result":
            value += rng.choice((-2, -1, 1, 2))
        if not 0 <= value <= MAX_VALUE:  # cannot be written in this vocabulary: use the true operation instead
            operator, operand = step.operator, step.operand
            value = apply(source, operator, operand)
            if not 0 <= value <= MAX_VALUE:
                value = min(max(value, 0), MAX_VALUE)
        return operator, operand, value


def _with_operand(line: str, operand: int) -> str:
    head, substitution, value = line.rsplit(" = ", 2)
    source, operator, _ = substitution.split()
    return f"{head} = {source} {operator} {operand} = {value}"

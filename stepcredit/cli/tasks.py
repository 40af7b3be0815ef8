"""`stepcredit tasks`: the tasks of reasoning-gym, and the options and levels of one."""

from collections.abc import Sequence
from importlib.metadata import metadata
from typing import TYPE_CHECKING, Any

from rich.console import Console

from stepcredit.cli.arguments import split
from stepcredit.errors import UserError

if TYPE_CHECKING:
    from stepcredit.tasks.gym.task import GymTask

HELP = """\
usage: stepcredit tasks [NAME ...] [--seed N]

The tasks of reasoning-gym that can be trained on: problems without end, made from seeds, each task with a scorer of its
own. Without a name all of them, with an example each; with names their options (defaults and what they may be), the
levels of their curricula, and examples.

  --seed N              of the examples, 0 when not given

Examples
  stepcredit tasks
  stepcredit tasks chain_sum gcd
  stepcredit train --model my-model --data gym:chain_sum,gcd --task.gym.chain_sum.level 3 --task.weights 2,1
  stepcredit eval --model my-model --data gym:chain_sum --task.gym.chain_sum.max_digits 2

Needs reasoning-gym: pip install 'stepcredit[gym]'. docs/gym.md has what every task was seen to do."""

OPTIONS = {"seed": "0"}
WIDTH = 100  # characters of an example in the list
EXAMPLES = 2


def main(words: Sequence[str]) -> int:
    if "--help" in words or "-h" in words:
        print(HELP)
        return 0
    names, own = split(words, OPTIONS, "tasks")
    seed = own.get("seed", OPTIONS["seed"])
    if not seed.isdigit():
        raise UserError(f"--seed: '{seed}' is not a whole number from 0 on")
    console = Console()
    if names:
        for name in names:
            _show(console, name.removeprefix("gym:"), int(seed))
    else:
        _list(console, int(seed))
    return 0


def _print(console: Console, text: str = "", style: str | None = None) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def _list(console: Console, seed: int) -> None:
    from stepcredit.tasks.gym.names import LICENCES, REFUSED, names

    offered = names()
    _print(console, f"{len(offered)} tasks of reasoning-gym {metadata('reasoning-gym')['Version']} ({_licence()})")
    width = max(map(len, offered))
    for name in offered:
        task = _task(name, seed)
        (problem,) = task.draw(0, 1)
        _print(console, f"{name:{width}}  {_line(problem.columns['gym']['entry'], problem.answer)}")
        if name in LICENCES:
            _print(console, f"{'':{width}}  licence: {LICENCES[name]}")
        if name in REFUSED:
            _print(console, f"{'':{width}}  refused unless --task.gym.{name}.allow true: {REFUSED[name]}")


def _show(console: Console, name: str, seed: int) -> None:
    from stepcredit.tasks.gym.names import LICENCES, REFUSED, attributes_of, options_of

    task = _task(name, seed)
    _print(console, f"gym:{name}, of reasoning-gym ({LICENCES.get(name) or _licence()})", style="bold")
    if name in REFUSED:
        _print(console, f"refused unless --task.gym.{name}.allow true: {REFUSED[name]}")
    _print(console, f"\nOptions (--task.gym.{name}.OPTION)")
    for option in options_of(name):
        default = f"{option.name} {_shown(option.default)}"
        _print(console, f"  {default:40} {option.kind:8} {', '.join(option.conditions)}".rstrip())
    attributes = attributes_of(name)
    if attributes:
        _print(console, f"\nLevels (--task.gym.{name}.level N for all, .level.ATTRIBUTE N for one), from 0 on")
    for attribute in attributes:
        _print(console, f"  {attribute.name:24} {', '.join(map(_shown, attribute.levels))}")
        about = f"{'':2} {'':24} sets {', '.join(attribute.options)}"
        _print(console, about + (f": {attribute.description}" if attribute.description else ""))
    for problem in task.draw(0, EXAMPLES):
        _print(console, f"\n{problem.question}")
        _print(console, "answer: none that is known" if problem.answer is None else f"answer: {problem.answer}")
    _print(console)


def _task(name: str, seed: int) -> "GymTask":
    from stepcredit.tasks.gym.names import REFUSED
    from stepcredit.tasks.gym.task import GymTask

    return GymTask(name, {"allow": True} if name in REFUSED else {}, "tags", seed)


def _licence() -> str:
    about = metadata("reasoning-gym")
    return about["License-Expression"] or about["License"] or "licence not stated"


def _line(entry: str, answer: str | None) -> str:
    """A question and its answer on one line, the middle of a long question left out."""
    from stepcredit.verifiers.gym import decoded

    question = " ".join(str(decoded(entry)["question"]).split())
    shown = question if len(question) <= WIDTH else f"{question[: WIDTH // 2]} ... {question[-WIDTH // 2 + 5 :]}"
    said = " ".join(str(answer).split())
    return f"{shown} -> {said if len(said) <= 30 else said[:27] + '...'}" if answer is not None else shown


def _shown(value: Any) -> str:
    text = str(getattr(value, "value", value))
    return text if len(text) <= 30 else f"{text[:27]}..."

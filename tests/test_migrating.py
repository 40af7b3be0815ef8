"""Options of TRL and verl are answered with ours, and docs/migrating.md says the same."""

import doctest
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from stepcredit.cli import others
from stepcredit.cli.arguments import SHORT, parse
from stepcredit.cli.others import AMBIGUOUS, GENERIC, OPTIONS
from stepcredit.config import Config
from stepcredit.config.resolve import resolve
from stepcredit.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
OWN = {"config": None, "resume": "never"}
NAMES = [(name, option) for option in OPTIONS for name in (*option.trl, *option.verl)]


def told(*words):
    with pytest.raises(UserError) as error:
        parse(words, OWN, "train")
    return str(error.value)


def has(path):
    """The schema has this option, or it is one of the loss by default."""
    section = Config
    *sections, last = path.split(".")
    for name in sections:
        section = type(section.model_fields[name].default)
    return last in section.model_fields or (sections == ["loss"] and resolve({"loss": {last: 0.3}}) is not None)


@pytest.mark.parametrize("here", sorted({option.here for option in OPTIONS}))
def test_what_is_named_exists(here):
    name = here.removeprefix("--")
    assert name in OWN or has(SHORT.get(name, name.replace("-", "_")))


@pytest.mark.parametrize("name, option", NAMES, ids=[name for name, _ in NAMES])
def test_a_name_is_answered_with_ours(name, option):
    library = "TRL" if name in option.trl else "verl"
    for words in ([f"--{name}", "1"], [f"--{name}=1"], [f"--{name.replace('_', '-')}", "1"]):
        assert f"unknown option; {library}'s {name} is {option.here} here" in told(*words)
    if library == "verl":
        for word in (f"{name}=1", f"+{name}=1"):
            assert f"train: '{word}': verl's {name} is {option.here} here" in told(word)
        last = name.rpartition(".")[2]
        mine = any(last in each.trl for each in OPTIONS) or last.replace("_", "-") in SHORT
        if last not in GENERIC and not mine:
            assert f" is {option.here} here" in told(f"--{last}", "1")


def test_no_option_of_ours_is_taken_for_theirs():
    paths = {f"{name}.{inner}" for name, field in Config.model_fields.items() if isinstance(field.default, BaseModel)
             for inner in type(field.default).model_fields}  # fmt: skip
    assert not (paths | set(SHORT)) & {name for name, _ in NAMES} - {"temperature"}


def test_beta_is_left_to_the_user():
    assert "KL coefficient in TRL (--objective.kl.coef here), and a scale of spro" in told("--beta", "0.04")
    assert not any(name in AMBIGUOUS for name, _ in NAMES)
    assert parse(["--credit.beta", "0.1"], OWN, "train")[0] == {"credit": {"beta": 0.1}}


def test_other_words_are_as_before():
    assert "did you mean --iterations?" in told("--iteration", "3")
    assert "no such" in told("gone.yaml") and "no such" in told("a=b.yaml")


def test_the_page_has_the_same_table():
    rows = re.findall(r"^\| `(--[a-z.-]+)` \| (.*?) \| (.*?) \| (.*?) \|$", PAGE.read_text(), re.MULTILINE)

    def cell(names):
        return ", ".join(f"`{name}`" for name in names)

    assert rows == [(option.here, cell(option.trl), cell(option.verl), option.note) for option in OPTIONS]


def test_the_example_holds():
    assert doctest.testmod(others).failed == 0

"""The one exception that means "the input is wrong", shown to users as a single line without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave is wrong: a file, a row, an option. The message names it and says what to do.

    The command line prints it as one line and exits with code 2.

    Attributes:
        already_reported: another process prints it.
    """

    already_reported = False


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The part of an error message that lists the valid names, closest first.

    >>> did_you_mean("grop", ["grpo", "opo"])
    "did you mean 'grpo'? (choices: grpo, opo)"
    """
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}(choices: {', '.join(choices)})"

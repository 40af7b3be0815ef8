"""Names from tables of choices, and the user's own by dotted path."""

import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from stepcredit.errors import UserError, did_you_mean

log = logging.getLogger("stepcredit")
_told: set[str] = set()  # dotted paths that the log has named


def by_name(option: str, name: str, table: Mapping[str, Callable[..., Any] | str]) -> Callable[..., Any]:
    """The function that `table` lists under `name` (itself or its dotted path), or the one at the dotted path `name`.

    Raises:
        UserError: naming `option`, when there is no such function.
    """
    found = table.get(name, name)
    if not isinstance(found, str):
        return found
    module, _, attribute = found.rpartition(".")
    if not module:
        raise UserError(f"{option}: '{name}' is not known; {did_you_mean(name, table)}, or give a dotted path")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a user's module beside the config, as `python -m` would find it
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{option}: cannot import '{name}' ({error})") from error
    if name not in table and name not in _told:
        _told.add(name)
        log.info("%s: code of your own, %s from %s", option, name, sys.modules[module].__file__)
    if not callable(function):
        raise UserError(f"{option}: '{name}' is a {type(function).__name__}, not a function")
    return function

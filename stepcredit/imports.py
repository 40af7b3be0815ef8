"""Names from tables of choices, the user's own by dotted path, and the options of what they name."""

import importlib
import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

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


def check_options(part: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise `UserError` when `options` has a name or a value that the function does not take.

    Options are the arguments of the function behind its first one; their defaults, `Literal` and `Annotated` types say
    what values they take.

    Args:
        part: what the function is, and the section of its options: "credit", "loss".
    """
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = {parameter.name: parameter for parameter in parameters}
    for option, value in options.items():
        if option not in known:
            hint = did_you_mean(option, known) if known else "it has no options"
            raise UserError(f"{part} '{name}' has no option '{option}': {hint}")
        annotation = known[option].annotation
        choices = get_args(annotation)
        if get_origin(annotation) is Literal and value not in choices:
            raise UserError(f"{part}.{option}: {value!r} is not one of {', '.join(map(str, choices))}")
        default = known[option].default
        number = isinstance(default, float) and isinstance(value, (int, float)) and not isinstance(value, bool)
        if default is not inspect.Parameter.empty and not number and type(value) is not type(default):
            raise UserError(
                f"{part}.{option}: {value!r} is not a {type(default).__name__} ({part} '{name}', default {default!r})"
            )
        if number and not math.isfinite(value):
            raise UserError(f"{part}.{option}: {value!r} is not a finite number")
        if get_origin(annotation) is Annotated:
            try:
                TypeAdapter(annotation).validate_python(value)
            except ValidationError as error:
                raise UserError(f"{part}.{option}: {error.errors()[0]['msg'].lower()}, got {value!r}") from error

"""Options: groups with one schema, owned by the part that reads them, and those of functions that a config names."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from stepcredit.errors import UserError, did_you_mean


def split(value: Any) -> Any:
    """`a,b` as a list, and a lone number as a list of one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [value]
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class Expanded:
    """Marks text, a path or the name of a part, in which `~` and `${NAME}` are expanded (config/values.py)."""


Place = Annotated[str, Expanded()]
Places = Annotated[list[str], BeforeValidator(split), Expanded()]
Decay = Annotated[float, Field(ge=0, lt=1)]
Names = Annotated[list[str], BeforeValidator(split)]
Numbers = Annotated[list[float], BeforeValidator(split)]
Ids = Annotated[list[int] | None, BeforeValidator(split)]


class Section(BaseModel):
    """Options with their defaults and bounds; an unknown one is an error. Comments behind them are their manual."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, defer_build=True)


class Choice(BaseModel):
    """The name of a part that users may add to, and that part's own options, which it checks itself."""

    model_config = ConfigDict(extra="allow")
    name: Place

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def check_options(
    part: str, name: str, function: Callable[..., Any], options: Mapping[str, Any], num_inputs: int = 1
) -> None:
    """Raise `UserError` when `options` has a name or a value that the function does not take.

    Options are the arguments of the function behind its inputs; their defaults, `Literal` and `Annotated` types say
    what values they take.

    Args:
        part: what the function is, and the section of its options: "credit", "loss".
        num_inputs: arguments in front that are no options.
    """
    parameters = list(inspect.signature(function).parameters.values())[num_inputs:]
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

"""`Section`: a group of options with one schema, owned by the part that reads them."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


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

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class Choice(BaseModel):
    """The name of a part that users may add to, and that part's own options, which it checks itself."""

    model_config = ConfigDict(extra="allow")
    name: Place

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

"""From what a user gave to the full config, and what is said of an option that does not fit.

defaults of the schema < the algorithm's < the recipe of a model that comes with the package < YAML < command line
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from stepcredit.config.algorithms import algorithm
from stepcredit.config.places import expand_all
from stepcredit.config.renamed import with_new_names
from stepcredit.config.schema import SUM, Config
from stepcredit.demo.recipe import EMBEDDED_CREDIT, EMBEDDED_RECIPE, EMBEDDED_TREES, EMBEDDED_WINDOW
from stepcredit.errors import UserError, did_you_mean

SECTIONS = {name for name, field in Config.model_fields.items() if isinstance(field.default, BaseModel)}


def resolve(given: Mapping[str, Any]) -> Config:
    """The full config: what a user gave (a nested dictionary) over the defaults of the algorithm and recipe.

    Raises:
        UserError: naming the option that is unknown or has a value that does not fit.
    """
    given = _with_name_of_sum(expand_all(with_new_names(given)))
    chosen = algorithm(str(given.get("algorithm", "grpo")))
    layers: list[Mapping[str, Any]] = [
        {"credit": {"name": chosen.credit}, "objective": dict(chosen.objective), "growth": dict(chosen.growth)},
        {"filter": dict(chosen.filter), "optim": dict(chosen.optim), "critic": dict(chosen.critic)},
        {"sampler": dict(chosen.sampler)},
        {"shapers": list(chosen.shapers)},
        {"growth": {"group_size": chosen.group_size} if chosen.group_size is not None else {}},
    ]
    loss = given.get("loss")
    own_loss = chosen.loss.get("name", "clip")
    if not isinstance(loss, Mapping) or loss.get("name", own_loss) == own_loss:  # another one has other options
        layers.append({"loss": dict(chosen.loss)})
    credit = given.get("credit")
    same_credit = not isinstance(credit, Mapping) or credit.get("name", chosen.credit) == chosen.credit
    if same_credit:  # another credit function has other options
        layers.append({"credit": dict(chosen.credit_options)})
    if given.get("model", "embedded") == "embedded":
        layers += [EMBEDDED_RECIPE, EMBEDDED_TREES if chosen.growth.get("name") == "tree" else {}]
        layers.append(EMBEDDED_WINDOW if chosen.sampler.get("window") else {})
        layers.append({"filter": chosen.filter} if chosen.filter.get("keep") == "varied" else {})
        if same_credit:
            layers.append({"credit": EMBEDDED_CREDIT.get(chosen.credit, {})})
    merged: dict[str, Any] = {}
    for layer in [*layers, given]:
        merged = merge(merged, layer)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(error)) from error


def _with_name_of_sum(given: dict[str, Any]) -> dict[str, Any]:
    """A sum of credits has the name `sum`, whatever the algorithm's credit is called."""
    credit = given.get("credit")
    if isinstance(credit, Mapping) and credit.get("sum") is not None:
        return given | {"credit": {"name": SUM, **credit}}
    return given


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        if value is None and (isinstance(merged.get(key), Mapping) or key in SECTIONS):
            continue  # a section of a YAML file with nothing under it
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(path))
    if first["type"] == "extra_forbidden":
        section: Any = Config
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        return f"{name}: unknown option; {did_you_mean(path[-1], section.model_fields)}"
    if first["type"] == "literal_error":
        return f"{name}: '{first['input']}' is not known; {did_you_mean(str(first['input']), _choices(first))}"
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{name}: expected a section with options, found {first['input']!r:.60}"
    if first["input"] is None:
        return f"{name}: has no value (empty or null); give it one, or leave it out for its default"
    if first["type"] == "value_error":
        return f"{name}: {first['ctx']['error']}"
    return f"{name}: {first['msg'].lower()}, got {first['input']!r:.60}"


def _choices(error: Any) -> list[str]:
    """The valid values of an option that names one of a few."""
    return re.findall(r"'([^']*)'", error["ctx"]["expected"])

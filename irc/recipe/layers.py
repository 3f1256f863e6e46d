"""Settings from several places (a file, then options), laid over each other and checked together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from irc.errors import InputError
from irc.files.strict_yaml import parse_yaml
from irc.recipe.refusals import conflict_in, model_of, path_name, refusal, shown_value, unknown_key
from irc.recipe.removed import was_removed

Model = TypeVar("Model", bound=BaseModel)
_EXAMPLE = "router.steps=500"


@dataclass(frozen=True)
class Layer:
    """Values from one place.

    Attributes:
        source: How errors name the place, such as `recipe mine.yaml` or `--set`; empty to leave it out.
        values: Nested plain data; what it does not name comes from the layers below.
    """

    source: str
    values: Mapping[Any, Any]


def build(model: type[Model], layers: Sequence[Layer]) -> Model:
    """Build a model from layers, the first at the bottom.

    Every layer's values are checked on their own place, so that an error names it. Fields must fit together only at
    the end: a recipe may name a policy that the next option replaces. Of a model's `alternatives`, a source that gives
    one discards those of the sources below it.

    Args:
        model: What to build.
        layers: Their values; none gives the defaults.

    Raises:
        InputError: A key is unknown, a value is not allowed, or values do not go together.
    """
    merged: dict[Any, Any] = {}
    built = None if layers else model()
    alternatives: tuple[str, ...] = getattr(model, "alternatives", ())
    source = None
    for layer in layers:
        if any(layer.values.get(name) is not None for name in alternatives):
            if layer.source != source:
                merged = {key: value for key, value in merged.items() if key not in alternatives}
            source = layer.source
        merged = _laid_over(merged, layer.values)
        try:
            built = model.model_validate(merged)
        except ValidationError as error:
            conflict = conflict_in(error)
            if conflict is None:
                raise refusal(error, model, layer.source) from error
            if layer is layers[-1]:
                raise refusal(error, model, _source_of(conflict.fields, layers)) from error
    assert built is not None
    return built


def setting_layer(model: type[BaseModel], text: str, source: str = "") -> Layer:
    """Return the layer of one setting.

    Args:
        model: The model whose field is set.
        text: Such as `router.steps=500`; the value is YAML.
        source: How errors name the place.

    Raises:
        InputError: The text is not `key=value`, or there is no such field.
    """
    key, separator, value = (part.strip() for part in text.partition("="))
    place = f"{source} " if source else ""
    if not (key and separator):
        missing = "the key before = is missing; " if separator else ""
        raise InputError(f"{place}{text}: {missing}expected key=value, such as {_EXAMPLE}")
    try:
        values = parse_yaml(value)
    except ValueError as error:
        raise InputError(f"{place}{key}={value[:40]}: the value cannot be read as YAML ({error})") from error
    path = key.split(".")
    _check_names_field(model, path, values, f"{source}: " if source else "")
    for part in reversed(path):
        values = {part: values}
    return Layer(source, values)


def _check_names_field(model: type[BaseModel], path: Sequence[str], value: Any, place: str) -> None:
    """Refuse a path that leads to no field, or to a whole group of fields."""
    if was_removed(path_name(path)):
        return
    group: type[BaseModel] | None = model
    for part in path:
        if group is None or part not in group.model_fields:
            raise InputError(f"{place}{unknown_key(model, path)}")
        group = model_of(group.model_fields[part])
    if group is not None:
        name = path_name(path)
        example = f"{name}.{next(iter(group.model_fields))}"
        raise InputError(
            f"{place}{name} is {shown_value(value)}, but it is a group of fields; set one of them, such as {example}"
        )


def _laid_over(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _laid_over(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _source_of(fields: Sequence[str], layers: Sequence[Layer]) -> str:
    """Return the source of the topmost layer that sets one of these fields."""
    for layer in reversed(layers):
        if any(_sets(layer.values, field.split(".")) for field in fields):
            return layer.source
    return ""


def _sets(values: Any, path: Sequence[str]) -> bool:
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True

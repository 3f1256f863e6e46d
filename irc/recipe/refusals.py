"""One place that turns pydantic's errors into the sentences that users read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from irc.errors import InputError
from irc.files.strict_yaml import short_repr

LARGEST_INTEGER = 2**53
"""The largest whole number that a field takes; a float64 holds every whole number up to it exactly."""

_MOST_SHOWN_BITS = 1024
_DIGITS_PER_BIT = 0.30103
_LONGEST_KEY = 200
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "keys and values",
    "string_type": "text",
}
_WORDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
_BOUNDS = ("greater_than_equal", "greater_than", "less_than_equal", "less_than", "finite_number")


class Conflict(ValueError):
    """Fields that are each valid but do not go together; raised by the validators of whole models.

    Attributes:
        fields: Names of the fields, such as `router.reads`.
    """

    def __init__(self, message: str, *fields: str) -> None:
        super().__init__(message)
        self.fields = fields


def conflict_in(error: ValidationError) -> Conflict | None:
    """Return the conflict that an error reports, or None if a single value is wrong."""
    cause = error.errors(include_url=False)[0].get("ctx", {}).get("error")
    return cause if isinstance(cause, Conflict) else None


def refusal(error: ValidationError, model: type[BaseModel], source: str = "") -> InputError:
    """Return the error to raise in place of pydantic's.

    Args:
        error: What pydantic raised; only its first finding is reported.
        model: The model that was validated.
        source: Where the value was read, such as `recipe mine.yaml`; begins the message unless it is empty.
    """
    sentence = _sentence(error.errors(include_url=False)[0], model)
    return InputError(f"{source}: {sentence}" if source else sentence)


def unknown_key(model: type[BaseModel], path: Sequence[str | int]) -> str:
    """Return the message for a key that a model does not have; it names the nearest one that it has.

    Args:
        model: The outermost model.
        path: Keys from the outermost to the unknown one.
    """
    subject = f"unknown key {path_name(path)[:_LONGEST_KEY]}"
    group: type[BaseModel] | None = model
    for index, part in enumerate(path):
        parent = path_name(path[:index])
        if group is None:
            return f"{subject}; {parent} has no fields"
        field = group.model_fields.get(str(part))
        if field is None:
            near = difflib.get_close_matches(str(part), group.model_fields, n=1)
            if near:
                return f"{subject}; did you mean {path_name([*path[:index], near[0]])}?"
            return f"{subject}; the fields{f' of {parent}' if parent else ''} are {', '.join(group.model_fields)}"
        group = model_of(field)
    return subject


def path_name(path: Sequence[str | int]) -> str:
    """Return how errors write the place of a value: `router.steps`, or `dial[0]` inside a list."""
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def _sentence(found: Mapping[str, Any], model: type[BaseModel]) -> str:
    path, kind, value = found["loc"], found["type"], found.get("input")
    context = found.get("ctx", {})
    if kind in ("extra_forbidden", "invalid_key", "no_such_attribute"):
        return unknown_key(model, [str(part) for part in path])
    if kind == "missing":
        return f"{path_name(path)} is missing"
    if kind == "too_short":
        return f"{path_name(path)} is {shown_value(value)}; give at least {_count(context['min_length'])}"
    if kind == "value_error" and not path:
        return str(context["error"])
    if kind == "value_error":
        return f"{path_name(path)} is {shown_value(value)}; {context['error']}"
    if kind == "literal_error":
        return f"{path_name(path)} is {shown_value(value)}; choose from {_choices(context['expected'])}"
    wanted = _EXPECTED.get(kind, "")
    if kind in _BOUNDS:
        field = _field_at(model, path)
        wanted = (_range(field, kind) if field else "") or _in_words(context) or wanted
    if not wanted:
        said = str(found["msg"])
        return f"{path_name(path)} is {shown_value(value)}; {said[:1].lower()}{said[1:]}"
    return f"{path_name(path)} is {shown_value(value)}; give {wanted}"


def shown_value(value: Any) -> str:
    """Return a value as an error shows it; Python refuses to write out whole numbers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > _MOST_SHOWN_BITS:
        return f"a number of {int(value.bit_length() * _DIGITS_PER_BIT) + 1} digits"
    return short_repr(value)


def _choices(expected: str) -> str:
    """Return pydantic's list of literals without quotes and without the empty text, which leaves a field unset."""
    names = expected.replace(" or ", ", ").split(", ")
    return ", ".join(name.strip("'") for name in names if name != "''")


def _count(least: int) -> str:
    return "one entry" if least == 1 else f"{least} entries"


def _range(field: FieldInfo, kind: str) -> str:
    """Return which numbers a field takes, such as `a number from 0 to 1`."""
    bounds: dict[str, float] = {
        name: getattr(entry, name) for entry in field.metadata for name in _WORDS if hasattr(entry, name)
    }
    if bounds.get("le") == LARGEST_INTEGER and kind != "less_than_equal":
        del bounds["le"]
    if "ge" in bounds and "le" in bounds:
        return f"a number from {bounds['ge']} to {bounds['le']}"
    words = _in_words(bounds)
    if kind == "finite_number":
        return f"a finite number of {words}" if words else "a finite number"
    return words


def _in_words(bounds: Mapping[str, float]) -> str:
    return " and ".join(f"{_WORDS[name]} {bound:g}" for name, bound in bounds.items() if name in _WORDS)


def _field_at(model: type[BaseModel], path: Sequence[str | int]) -> FieldInfo | None:
    """Return the field at a path; None inside of lists and mappings."""
    group: type[BaseModel] | None = model
    found = None
    for part in path:
        found = group.model_fields.get(str(part)) if group and isinstance(part, str) else None
        group = model_of(found)
    return found


def model_of(field: FieldInfo | None) -> type[BaseModel] | None:
    """Return the model that a field holds; None if it holds a plain value."""
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None

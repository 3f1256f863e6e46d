"""The base class of settings and saved files: strict fields, and InputError in place of pydantic's errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from irc.recipe.refusals import LARGEST_INTEGER, refusal

Made = TypeVar("Made")


def _number(value: Any) -> Any:
    """Return the number that a text holds: YAML reads `1e-3`, without a point, as text."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value  # refused by its type


Real = Annotated[float, BeforeValidator(_number)]
"""A finite number; whole numbers and texts such as `1e-3` are read as floats."""

Share = Annotated[Real, Field(ge=0, le=1)]
"""A fraction from 0 to 1."""

Count = Annotated[int, Field(ge=1, le=LARGEST_INTEGER)]
"""A whole number of at least 1."""

Natural = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
"""A whole number of at least 0."""


class Checked(BaseModel):
    """A model whose values are checked when it is made and at every assignment.

    Types are strict: true is not a number, and 1.0 is not a whole number. Infinity and NaN are refused.

    Raises:
        InputError: Names the field, its value and what is allowed.
    """

    model_config = ConfigDict(strict=True, extra="forbid", validate_assignment=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        self._translated(lambda: super(Checked, self).__init__(**values))

    # Pydantic then builds nested models itself, so that an error keeps the whole path of its field.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; if the whole does not fit together with it, the old value stays."""
        before = dict(self.__dict__)
        try:
            self._translated(lambda: super(Checked, self).__setattr__(name, value))
        except Exception:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    @classmethod
    def _translated(cls, make: Callable[[], Made]) -> Made:
        try:
            return make()
        except ValidationError as error:
            raise refusal(error, cls) from error

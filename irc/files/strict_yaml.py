"""Reads untrusted YAML: plain data only, without duplicate keys, and without aliases that expand to gigabytes."""

from __future__ import annotations

import reprlib
from typing import Any

import yaml

_MAX_INTEGER_BITS = 1024  # the size of the largest float64
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


class _StrictLoader(yaml.SafeLoader):
    """Loads plain data."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases."""
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse duplicate keys."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise ValueError(f"duplicate key in the mapping that begins at line {node.start_mark.line + 1}")
        return mapping

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Refuse huge numbers, such as thousands of hexadecimal digits, which Python cannot print."""
        # Check the text first: each digit is at least one bit, and Python refuses to parse thousands of decimals.
        too_long = len(node.value) > _MAX_INTEGER_BITS
        number = 0 if too_long else int(super().construct_yaml_int(node))
        if too_long or number.bit_length() > _MAX_INTEGER_BITS:
            raise ValueError(f"the number in line {node.start_mark.line + 1} is too large")
        return number


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """Return the data in a YAML text.

    Raises:
        ValueError: The text is not valid YAML, is nested too deeply, or contains an impossible value, an alias or a
            duplicate key.
    """
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError:
        raise
    except Exception as error:  # for example, a date such as the 31st of February
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error


def short_repr(value: Any) -> str:
    """Return a value as an error message shows it, on one short line."""
    return _SHORT.repr(value)

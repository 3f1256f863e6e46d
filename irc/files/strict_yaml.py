"""YAML that others wrote: plain data, no key twice, no aliases (a few lines of which can stand for gigabytes)."""

from __future__ import annotations

import reprlib
from typing import Any

import yaml

_MOST_BITS = 1024  # of the largest float64
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


class _Loader(yaml.SafeLoader):
    """Reads plain data."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases."""
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there twice."""
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise ValueError(f"a key is there twice in the lines from {node.start_mark.line + 1} on")
        return found

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Refuse a number that Python would not even write out, such as hexadecimal digits by the thousand."""
        # Every digit is a bit or more, and Python itself reads no decimals of some thousand digits.
        if len(node.value) > _MOST_BITS or (found := super().construct_yaml_int(node)).bit_length() > _MOST_BITS:
            raise ValueError(f"the number in line {node.start_mark.line + 1} is larger than any that is meant")
        return int(found)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse(text: str) -> Any:
    """Return what a YAML text says.

    Raises:
        ValueError: It is no YAML, nested too deeply, holds a value that cannot be, an alias, or a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError:
        raise
    except Exception as error:  # values such as the 31st of February, or a timestamp that is none
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error


def shown(value: Any) -> str:
    """Return a value as a failure shows it, at most a line."""
    return _SHORT.repr(value)

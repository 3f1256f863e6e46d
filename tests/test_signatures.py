"""No function of the packages takes more than eight parameters, but for signatures that others fix."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 8
# transformers calls it by these names.
FIXED = {("irc/model/routed.py", "forward")}
# Operators: their schema lists the inputs and attributes one by one.
OPERATORS = {
    "exporters/onnx_ops.py": ("RoutedAttention", "ReducedAttention"),
    "exporters/onnx_table.py": ("_routed_attention", "_reduced_attention"),
    "irc/model/compacted.py": ("_routed_attention",),
    "passes/dialect_attention.py": ("routed_attention", "reduced_attention", "_"),
}
FIXED |= {(path, name) for path, names in OPERATORS.items() for name in names}


def is_click_command(function: ast.FunctionDef) -> bool:
    """Click gives every option of a command as a parameter."""
    return any(ast.unparse(decorator).startswith("click.command") for decorator in function.decorator_list)


def parameters(function: ast.FunctionDef) -> int:
    """Count what a caller gives: `self` and `cls` do not count, `*args` and `**kwargs` count as one each."""
    given = function.args
    positional = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    bound = positional[:1] in (["self"], ["cls"])
    return len(positional) - bound + len(given.kwonlyargs) + bool(given.vararg) + bool(given.kwarg)


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for package in ("irc", "passes", "exporters"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    yield path.relative_to(ROOT).as_posix(), node


def test_no_function_takes_more_than_eight_parameters() -> None:
    long = {
        f"{path}:{function.lineno} {function.name}: {parameters(function)}"
        for path, function in functions()
        if parameters(function) > MOST and not is_click_command(function) and (path, function.name) not in FIXED
    }
    assert long == set()


def test_every_exception_is_needed() -> None:
    long = {(path, function.name) for path, function in functions() if parameters(function) > MOST}
    assert FIXED - long == set()

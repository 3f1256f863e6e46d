"""Finds the mutants of a file, by mutmut's operators."""

from __future__ import annotations

import difflib
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import MutationVisitor, deep_replace
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import get_ignored_lines


@dataclass
class Mutant:
    """One change of one function.

    Attributes:
        path: The file.
        module: Its tree.
        old: The replaced node.
        new: Its replacement.
        lines: First and last line of the node.
        function: Name and first line, decorators included, of the function.
        number: Number of the mutant in its file.
    """

    path: Path
    module: cst.Module
    old: cst.CSTNode
    new: cst.CSTNode
    lines: tuple[int, int]
    function: tuple[str, int]
    number: int

    def source(self) -> str:
        return deep_replace(self.module, self.old, self.new).code

    def diff(self) -> str:
        before, after = self.module.code.splitlines(), self.source().splitlines()
        changed = list(difflib.unified_diff(before, after, lineterm="", n=0))[3:]
        return "\n".join(line for line in changed if not line.startswith("@@"))

    def key(self) -> str:
        text = f"{self.path.name} {self.number} {self.module.code_for_node(self.new)} {self.module.code}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Finder(MutationVisitor):
    """mutmut's visitor, which also enters decorated functions and tracks its position."""

    def __init__(self, path: Path, module: cst.Module, wrapper: MetadataWrapper) -> None:
        super().__init__(mutation_operators, get_ignored_lines(str(path), module.code, wrapper, None))
        self.path, self.module = path, module
        self.found: list[Mutant] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value == "cast":
            node.args[1].visit(self)
            return False
        return super().on_visit(node)

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef):
            return False
        return isinstance(node, cst.Parameters) or super()._skip_node_and_children(node)

    def _create_mutations(self, node: cst.CSTNode) -> None:
        before = len(self.mutations)
        super()._create_mutations(node)
        for mutation in self.mutations[before:]:
            function: Any = mutation.contained_by_top_level_function
            if isinstance(function, cst.FunctionDef):
                first = self.get_metadata(PositionProvider, (*function.decorators, function)[0]).start.line
                place = self.get_metadata(PositionProvider, node, None) or self.get_metadata(PositionProvider, function)
                lines = place.start.line, place.end.line
                at = function.name.value, first
                self.found.append(Mutant(self.path, self.module, node, mutation.mutated_node, lines, at, 0))


def mutants_of(path: Path) -> list[Mutant]:
    """Return all mutants of a file, in the order of its lines."""
    wrapper = MetadataWrapper(cst.parse_module(path.read_text()), unsafe_skip_copy=True)
    finder = Finder(path, wrapper.module, wrapper)
    wrapper.visit(finder)
    for number, mutant in enumerate(finder.found):
        mutant.number = number
    return finder.found


def in_order(files: list[list[Mutant]], seed: int, first: int) -> list[Mutant]:
    """Shuffle mutants reproducibly: first `first` of every file, one file after the other, then all others."""
    shuffled = [random.Random(seed).sample(file, len(file)) for file in files]
    turns = [file[turn] for turn in range(first) for file in shuffled if turn < len(file)]
    rest = [mutant for file in shuffled for mutant in file[first:]]
    random.Random(seed).shuffle(rest)
    return turns + rest

"""Checks what README and docs claim: Python blocks run; commands, options, files, links and import paths exist."""

from __future__ import annotations

import pkgutil
import re
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import click
import pytest

from irc.bundle.saving import save_bundle
from irc.cli import group, main
from irc.model.routed import RoutedForCausalLM
from irc.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(page.name, block) for page in PAGES for block in pattern.findall(page.read_text())]


def commands() -> list[tuple[str, str]]:
    """Every `irc ...` in backquotes, and every line of a console block that runs it."""
    found = [(page.name, text) for page in PAGES for text in re.findall(r"`(irc [a-z][^`]*)`", page.read_text())]
    found += [(page, line) for page, line in shell_lines_by_page() if re.match(r"irc [a-z]", line)]
    return found


def shell_lines_by_page() -> list[tuple[str, str]]:
    """Every command line of the blocks for a shell, continued lines joined."""
    found = [(page, block.replace("\\\n", " ")) for language in ("console", "sh") for page, block in blocks(language)]
    return [
        (page, re.sub(r"^(?:\$ )?(?:\.venv/bin/)?", "", line)) for page, block in found for line in block.splitlines()
    ]


def shell_lines() -> list[str]:
    return [line for _, line in shell_lines_by_page()]


def flags(name: str) -> set[str]:
    command = group.group.get_command(click.Context(group.group), name)
    assert command is not None, f"there is no command '{name}'"
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: value.split("\n")[0][:40])
def test_python_runs(
    page: str, code: str, make_routed: Callable[[], RoutedForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "build").mkdir()
    save_bundle(make_routed(), tmp_path / "build" / "demo-bundle")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 5


@pytest.mark.parametrize(("page", "text"), commands(), ids=lambda value: value)
def test_verbs_and_options_exist(page: str, text: str) -> None:
    verb, *arguments = shlex.split(text.replace("[", " ").replace("]", " "), comments=True)[1:]
    known = flags(verb)
    assert {word for word in arguments if word.startswith("-")} <= known


SETTINGS = sorted({line for line in [*shell_lines(), *(text for _, text in commands())] if "--set " in line})


@pytest.mark.parametrize("line", SETTINGS)
def test_settings_and_recipes_that_are_named_exist(line: str) -> None:
    words = shlex.split(line)
    pairs = list(pairwise(words))
    recipes = [Path(value) for flag, value in pairs if flag == "--recipe" and "." in value]
    settings = [value for flag, value in pairs if flag == "--set" and "..." not in value]
    load_recipe(recipes[0] if recipes else None, settings)


def test_targets_of_make_that_are_named_exist() -> None:
    there = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z]+)", page.read_text())}
    named |= {word for line in shell_lines() for word in re.findall(r"^make ([a-z]+)", line)}
    assert len(named) > 5
    assert named <= there


def test_the_commands_that_need_nothing_but_a_bundle_run(
    make_routed: Callable[[], RoutedForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others train for minutes (`make demo` runs those of README.md), or need a server or GPUs."""
    runnable = [line for line in shell_lines() if line.startswith("irc export build/demo-bundle")]
    assert runnable == [
        "irc export build/demo-bundle -o build/demo-int4 --dtype int4",
        "irc export build/demo-bundle -o build/triton --layout triton",
    ]
    save_bundle(make_routed(), tmp_path / "build" / "demo-bundle")
    monkeypatch.chdir(tmp_path)
    assert [main(shlex.split(line)[1:]) for line in runnable] == [0, 0]
    assert (tmp_path / "build" / "triton" / "irc_text" / "config.pbtxt").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"`((?:irc|passes|exporters|examples|tests)/[\w/.]*)`", page.read_text()))
    named |= set(re.findall(r"python (examples/\w+\.py)", page.read_text()))
    examples = {"passes/verb_noun.py"}  # placeholders for names that the reader chooses
    assert [name for name in sorted(named - examples) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_architecture_names_every_folder_and_its_diagram_does_too() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = (ROOT / "docs" / "folders.svg").read_text()
    folders = [path.parent for top in ("irc", "passes", "exporters") for path in (ROOT / top).glob("**/__init__.py")]
    first = [folder for folder in folders if len(folder.relative_to(ROOT).parts) <= 2]
    named = {path.relative_to(ROOT).as_posix() + "/" for path in first if "native" not in path.parts} - {"irc/"}
    assert len(named) > 10
    assert [name for name in sorted(named) if f"| `{name}` |" not in text] == []
    undrawn = {"irc/former/"}  # re-exports for older imports
    assert [name for name in sorted(named - undrawn) if f"{Path(name).name}/" not in drawn] == []


MOVES = [
    (old, new, works == "yes")
    for old, new, works in re.findall(
        r"^\| `([\w.]+)` \| `([\w.]+)` \|(?: (yes|no) \|)?$", (ROOT / "docs" / "migration.md").read_text(), re.MULTILINE
    )
]


@pytest.mark.parametrize(("old", "new", "works"), MOVES, ids=lambda value: str(value))
def test_import_paths_that_moved_resolve(old: str, new: str, works: bool) -> None:
    found = pkgutil.resolve_name(new)
    if works:
        assert pkgutil.resolve_name(old).__name__ == found.__name__

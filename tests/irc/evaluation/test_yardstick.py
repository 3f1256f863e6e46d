"""The texts of the yardstick are the ones that LICENCE.md names, and what they claim to be."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

FOLDER = Path(str(resources.files("irc.evaluation"))) / "yardstick"
TEXTS = ("prose.txt", "code.txt", "technical.txt", "dialogue.jsonl")


def files_in_code() -> dict[str, str]:
    parts = re.split(r"^==> (\S+) <==\n", (FOLDER / "code.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_the_one_that_the_licence_names(name: str) -> None:
    content = (FOLDER / name).read_bytes()
    (row,) = re.findall(rf"^\| `{re.escape(name)}` \|.*$", (FOLDER / "LICENCE.md").read_text(), re.MULTILINE)
    assert row.endswith(f"| {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |")


def test_there_is_no_further_file() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*TEXTS, "LICENCE.md"}


def test_the_python_files_are_valid_and_pass_their_own_tests() -> None:
    files = files_in_code()
    assert list(files) == ["intervals.py", "plainconf.py", "workshop.py", "ringlog.c"]
    for name, source in files.items():
        if name.endswith(".py"):
            ast.parse(source, name)
    space: dict[str, object] = {"__name__": "workshop"}
    exec(compile(files["workshop.py"], "workshop.py", "exec"), space)
    space["test_bread_and_soup"]()  # type: ignore[operator]


def test_the_c_file_is_valid(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "ringlog.c").write_text(files_in_code()["ringlog.c"])
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(tmp_path / "ringlog.c")]
    subprocess.run(command, check=True, timeout=60)


def test_the_manual_is_wrapped_at_80_columns() -> None:
    assert max(map(len, (FOLDER / "technical.txt").read_text(encoding="utf-8").splitlines())) <= 80


def test_every_conversation_alternates_between_user_and_assistant() -> None:
    lines = (FOLDER / "dialogue.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 25
    for line in lines:
        messages = json.loads(line)["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() for message in messages)

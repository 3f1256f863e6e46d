"""What the console shows on a terminal, in a pipe, in a narrow window, and as JSON."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from irc import console
from irc.console import live

ESCAPE = "\x1b["


def in_terminal(code: str, **environment: str) -> str:
    """Run code with stdout and stderr on a pseudo-terminal; return all that it wrote."""
    leader, follower = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    setting = kept | {"TERM": "xterm-256color", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"} | environment
    process = subprocess.Popen(
        [sys.executable, "-c", f"from irc.console import *\n{code}"], stdout=follower, stderr=follower, env=setting
    )
    os.close(follower)
    chunks = []
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux reports the closed end of a pseudo-terminal as an error
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(leader)
    assert process.wait(timeout=60) == 0, b"".join(chunks).decode()
    return b"".join(chunks).decode().replace("\r\n", "\n")


def test_results_and_messages_go_to_their_streams(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("result")
    console.note("remark")
    console.warn("doubt")
    console.fail("cause; remedy")
    shown = capsys.readouterr()
    assert shown.out == "result\n"
    assert shown.err == "remark\nwarning: doubt\nerror: cause; remedy\n"


def test_brackets_and_long_lines_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    line = "[bold]/a[0]/path " * 60
    console.say(line)
    console.fail(line)
    shown = capsys.readouterr()
    assert shown.out == line + "\n"
    assert shown.err == f"error: {line}\n"


def test_colour_on_a_terminal_alone_and_never_with_no_color() -> None:
    code = "fail('cause')"
    assert ESCAPE in in_terminal(code)
    assert re.sub(r"\x1b\[[01]?m", "", in_terminal(code, NO_COLOR="1")) == "error: cause\n"


def test_json_has_only_what_json_knows(capsys: pytest.CaptureFixture[str]) -> None:
    class Scalar:
        def item(self) -> float:
            return 2.5

    console.emit_json({"inf": float("inf"), "path": Path("a") / "b", "tensor": Scalar(), "units": ({"n": 1},)})
    expected = {"inf": None, "path": "a/b", "tensor": 2.5, "units": [{"n": 1}]}
    assert json.loads(capsys.readouterr().out) == expected


def test_json_writes_nothing_when_a_value_has_no_form(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError, match="object has no JSON form"):
        console.emit_json({"fine": 1, "bad": object()})
    assert capsys.readouterr().out == ""


def test_table_formats_and_aligns(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("units", ["name", "hidden", "keep"], [["layers.0.mlp", 2816, 0.25], ["layers.10.mlp", 64, None]])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "units",
        "name           hidden  keep",
        "layers.0.mlp    2,816  0.25",
        "layers.10.mlp      64     -",
    ]


def test_table_refuses_a_row_of_another_length() -> None:
    with pytest.raises(ValueError, match="2 cells"):
        console.table("t", ["a", "b"], [[1]])


def test_a_narrow_terminal_loses_no_text() -> None:
    name = "model.layers.0.self_attn.query_projection"
    shown = in_terminal(f"table('', ['name', 'n'], [['{name}', 1]])", COLUMNS="24", NO_COLOR="1")
    lines = re.sub(r"\x1b\[\d*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 24
    assert name in "".join(line.rstrip(" 1") if i == 1 else line.strip() for i, line in enumerate(lines))


def test_tree_shows_branches_and_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    console.tree("model", {"layer 0": {"mlp": {"rank": 8}, "attention": None}, "files": ["a", "b"]})
    assert capsys.readouterr().out.splitlines() == [
        "model",
        "├── layer 0",
        "│   ├── mlp",
        "│   │   └── rank: 8",
        "│   └── attention",
        "└── files",
        "    ├── a",
        "    └── b",
    ]


@pytest.mark.parametrize(
    ("fraction", "filled"),
    [(0, 0), (0.001, 1), (0.5, 5), (0.999, 9), (1, 10), (7, 10), (-1, 0), (float("nan"), 0)],
)
def test_bar_is_empty_only_at_zero_and_full_only_at_one(fraction: float, filled: int) -> None:
    drawn = console.bar(fraction, 10)
    assert len(drawn) == 10
    assert sum(character in "█#" for character in drawn) == filled


def test_progress_in_a_pipe_is_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 100))
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with console.progress("train", 40) as running:
        for step in range(1, 26):  # a second each by the false clock
            running.update(step, loss=0.5, tokens_per_s=1234.5)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "train 10/40  loss 0.5  tokens/s 1,234  30 s left",
        "train 20/40  loss 0.5  tokens/s 1,234  20 s left",
        "train 25/40  loss 0.5  tokens/s 1,234  26 s total",
    ]


def test_progress_in_a_pipe_claims_no_end_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with console.progress("train", 4) as running:
            running.update(1)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        work()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", [60, 120])
def test_progress_on_a_terminal_is_live_and_lines_pass_above_it(width: int) -> None:
    code = (
        "with progress('train', 4) as p:\n    p.update(2, loss=0.5)\n    note('a remark')\n    p.update(4, loss=0.25)"
    )
    shown = in_terminal(code, COLUMNS=str(width), NO_COLOR="1")
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert "a remark\n" in plain
    assert "4/4" in plain
    assert "loss 0.25" in plain
    assert ("━" in plain) == (width == 120)


@pytest.mark.parametrize(
    ("width", "figures"),
    [
        (80, r" +[-\d:]+ +loss 1\.409  cosine 0\.8055  tokens/s 5,123"),
        (60, r" +[-\d:]+ +loss 1\.409  cosine 0\.8055"),
        (45, r" +[-\d:]+ +loss 1\.409"),
        (40, r" +[-\d:]+"),
        (25, ""),
    ],
)
def test_progress_in_a_narrow_terminal_keeps_name_and_count(width: int, figures: str) -> None:
    code = (
        "with progress('lff statistics', 200) as p:\n    p.update(99, loss=1.409, cosine=0.8055, tokens_per_s=5123.0)"
    )
    shown = in_terminal(code, COLUMNS=str(width), NO_COLOR="1")
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown).split("\r")[-1].rstrip()
    assert re.fullmatch(rf"lff statistics +99/200{figures}", last), last
    assert len(last) <= width


@pytest.mark.parametrize(
    "moment",
    ["console.Console.set_live", "live.Live._enable_redirect_io", "live.Live.refresh", "live._RefreshThread.start"],
)
def test_an_interrupt_as_the_bar_starts_or_ends_leaves_the_cursor_shown(moment: str) -> None:
    owner, _, name = moment.rpartition(".")
    code = f"""
import rich.console, rich.live
right = rich.{moment}
def interrupted(*arguments, **options):
    rich.{owner}.{name} = right
    raise KeyboardInterrupt
rich.{moment} = interrupted
try:
    with progress('train', 4) as running:
        running.update(1)
except KeyboardInterrupt:
    fail('interrupted')
"""
    shown = in_terminal(code, NO_COLOR="1")
    assert shown.endswith("interrupted\n")
    assert shown.rfind(f"{ESCAPE}?25h") > shown.rfind(f"{ESCAPE}?25l")


def test_names_that_would_command_a_terminal_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    """They may come from files of others: names of weights, keys of configurations."""
    record = logging.makeLogRecord(
        {"msg": "weight %s is not read", "args": ("a\x1b[31mé",), "levelno": logging.WARNING}
    )
    console.ConsoleHandler().emit(record)
    console.ConsoleHandler().emit(logging.makeLogRecord({"msg": "read \x07", "levelno": logging.INFO}))
    console.fail("no key \x1b]0;title\x07")
    told = capsys.readouterr().err
    assert "a\ufffd[31mé is not read" in told
    assert "\x1b]" not in told.replace(" ", "")
    assert "\x07" not in told


@pytest.mark.parametrize(("columns", "width"), [("0", "200"), ("", "200"), ("abc", "200"), ("-3", "200"), ("60", "60")])
def test_a_width_that_cannot_be_is_not_believed(columns: str, width: str) -> None:
    """As some editors, containers and schedulers set COLUMNS."""
    shown = subprocess.run(
        [sys.executable, "-c", "from irc.console import width; print(width())"],
        env=os.environ | {"COLUMNS": columns},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == width


def test_a_terminal_without_a_width_shows_all_of_a_table() -> None:
    assert "deep" in in_terminal("table('a', ['b'], [['deep']])", COLUMNS="0")


def test_forced_colours_make_no_live_bar_of_a_log() -> None:
    """As CI systems set FORCE_COLOR for output that goes to a file."""
    code = "from irc.console import *\nwarn('doubt')\nwith progress('lff', 2) as bar: bar.update(2)"
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    environment = kept | {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second = shown.stderr.splitlines()
    assert ESCAPE in first
    assert second == "lff 2/2  0 s total"

"""`irc inspect --text`: the decisions as figures, and as a page that a browser opens without errors."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from irc.bundle.saving import save_bundle
from irc.model.modules import Record
from irc.model.routed import RoutedForCausalLM
from irc.views.routes import TOKEN_CLASSES, Routes, read_routes, token_class

Make = Callable[..., RoutedForCausalLM]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture
def bundle(make_routed: Make, shake: Any, tmp_path: Path) -> Path:
    save_bundle(shake(make_routed()), tmp_path / "b")
    return tmp_path / "b"


def browse(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *flags]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)


def test_decisions_are_those_of_the_model(make_routed: Make, shake: Any, text_file: Path) -> None:
    model = shake(make_routed())
    routes = read_routes(model, str(text_file), 32)
    text = text_file.read_text()
    assert "".join(routes.tokens) == text[:32]  # one token per byte
    tape: dict[str, Record] = {}
    with torch.no_grad(), model.control.using(tape=tape, measure_error=True):
        model(input_ids=torch.tensor([list(model.base.tokenizer(text[:32])["input_ids"])]))
    for index, unit in enumerate(routes.units):
        record = tape[unit]
        assert torch.equal(routes.execute[index], record.execute[0])
        assert record.difference is not None
        assert record.cosine is not None
        torch.testing.assert_close(routes.error[index], 1 - record.cosine[0])
        # The confidence is the softmax of the router's two logits at the choice that was made.
        chosen = torch.where(record.execute[0], record.difference[0], -record.difference[0])
        torch.testing.assert_close(routes.confidence[index], torch.sigmoid(chosen))
    facts = routes.facts()
    assert facts["skipped"] == pytest.approx(1 - routes.execute.double().mean().item())
    assert sum(found["tokens"] for found in facts["by_class"].values()) == 32
    weighted = sum(found["tokens"] * found["skipped"] for found in facts["by_class"].values()) / 32
    assert weighted == pytest.approx(facts["skipped"])


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        *((" the", "word"), ("_x1", "word"), ("12", "number"), ("():", "punctuation"), ("    ", "space")),
        *(("\n    ", "line end"), ("\ufffd", "other"), ("", "other"), ("é", "word"), ("→", "other")),
    ],
)
def test_classes_of_tokens(token: str, expected: str) -> None:
    assert token_class(token) == expected
    assert expected in TOKEN_CLASSES


def test_errors_are_not_pooled_over_units() -> None:
    """Within both units the skipped tokens are the better forecast; over all pairs they look like the worse one."""
    execute = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, True, True]])
    error = torch.tensor([[0.2, 0.2, 0.2, 0.1], [0.9, 0.8, 0.8, 0.8], [0.5, 0.5, 0.5, 0.5]])
    units = ("a", "b", "c")
    kinds = ("ffn", "ffn", "ffn")
    routes = Routes(("x",) * 4, units, kinds, execute, torch.ones(3, 4), error)
    found = routes.facts()["error_by_unit"]
    assert found["a"] == {"executed": pytest.approx(0.2), "skipped": pytest.approx(0.1)}
    assert found["b"] == {"executed": pytest.approx(0.9), "skipped": pytest.approx(0.8)}
    assert found["c"] == {"executed": pytest.approx(0.5), "skipped": None}
    assert error[~execute].mean() > error[execute].mean()


def test_no_more_than_the_context_is_read(make_routed: Make, text_file: Path) -> None:
    assert len(read_routes(make_routed(), str(text_file), 10_000).tokens) == 64


def test_figures_in_json_and_on_the_terminal(irc_main: Any, bundle: Path, text_file: Path, tmp_path: Path) -> None:
    outcome = irc_main("inspect", bundle, "--text", text_file, "--tokens", "20", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["routes"]["tokens"] == 20
    assert set(outcome.json["routes"]["by_unit"]) == {unit["name"] for unit in outcome.json["units"]}
    outcome = irc_main("inspect", bundle, "--text", text_file, "--tokens", "20", "--html", tmp_path / "p.html")
    assert outcome.code == 0, outcome.err
    assert "20 tokens" in outcome.out
    assert str(tmp_path / "p.html") in outcome.out


@pytest.mark.slow
@needs_browser
def test_the_page_opens_in_a_browser(irc_main: Any, bundle: Path, tmp_path: Path) -> None:
    """The browser logs nothing and shows a cell for each token and unit; text that looks like markup stays text."""
    text, page = tmp_path / "evil.txt", tmp_path / "p.html"
    text.write_text("</script><script>console.error('x')</script> & <b>bold</b> {{ 7 * 7 }} \n" * 40)
    assert irc_main("inspect", bundle, "--text", text, "--tokens", "48", "--html", page).code == 0
    seen = browse(page, "--dump-dom")
    assert "CONSOLE" not in seen.stderr
    assert len(re.findall(r"<rect [^>]*data-t=", seen.stdout)) == 4 * 48
    assert len(re.findall(r'<span title=[^>]*style="background|<span style="background', seen.stdout)) == 48
    browse(page, f"--screenshot={tmp_path / 'p.png'}", "--window-size=1200,1400")
    assert (tmp_path / "p.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--html", "x.html"), "--text"),
        (("--text", "nothing.txt"), "nothing.txt"),
        (("--text", "{empty}"), "empty.txt"),
        (("--text", "{binary}"), "binary.txt"),
        (("--text", "{text}", "--html", "/nowhere/x.html"), "/nowhere/x.html"),
    ],
)
def test_bad_input(
    irc_main: Any, bundle: Path, tmp_path: Path, text_file: Path, arguments: tuple[str, ...], expected: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01" * 40)
    places = {"empty": tmp_path / "empty.txt", "binary": tmp_path / "binary.txt", "text": text_file}
    outcome = irc_main("inspect", bundle, *(argument.format(**places) for argument in arguments))
    assert outcome.code == 2
    assert expected in outcome.sentence()


def test_a_plain_model_has_no_decisions(irc_main: Any, model_folder: Path, text_file: Path) -> None:
    outcome = irc_main("inspect", model_folder, "--text", text_file)
    assert (outcome.code, "plain model" in outcome.sentence()) == (2, True)

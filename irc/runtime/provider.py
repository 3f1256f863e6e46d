"""ONNX Runtime itself: imported when it is first needed, its options, and the execution providers that really work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irc.errors import InputError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_PROBE_SECONDS = 180

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]
"""Runs a command and returns its output as text; raises OSError or SubprocessError."""


@dataclass(frozen=True)
class Provider:
    """One execution provider of ONNX Runtime.

    Attributes:
        name: Its name in ONNX Runtime.
        usable: Whether it ran a node.
        reason: Why it is not usable.
    """

    name: str
    usable: bool
    reason: str = ""


def onnxruntime() -> Any:
    """Import ONNX Runtime, or say how to get it."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise InputError(
            "ONNX Runtime is not installed; run pip install 'informed-routing-compiler[cpu]' or, for NVIDIA GPUs, "
            "pip install 'informed-routing-compiler[gpu]'"
        ) from error
    return ort


def session_options(threads: int = 0) -> Any:
    """Return options of a session that logs errors alone.

    Args:
        threads: Threads of one operator; 0 leaves it to ONNX Runtime.
    """
    options = onnxruntime().SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # Threads spin within a call, which is fast, and stop when it ends, which leaves the cores to others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def choose_provider(wanted: str) -> str:
    """Return `cpu` or `cuda`; `auto` is cuda if CUDA really loads.

    Raises:
        InputError: CUDA was asked for and does not load; the message says why.
    """
    if wanted not in ("auto", *PROVIDERS):
        raise InputError(f"provider is '{wanted}'; choose from auto, {', '.join(PROVIDERS)}")
    if wanted == "cpu":
        return "cpu"
    if PROVIDERS["cuda"] not in onnxruntime().get_available_providers():
        if wanted == "cuda":
            raise InputError(
                "provider is 'cuda', but this ONNX Runtime is built without CUDA; install onnxruntime-gpu in its place"
            )
        return "cpu"
    found = probe_provider(PROVIDERS["cuda"])
    if found.usable:
        onnxruntime().preload_dlls()
        return "cuda"
    if wanted == "cuda":
        raise InputError(f"provider is 'cuda', but it does not load: {found.reason}")
    return "cpu"


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with its output captured as text, for at most three minutes."""
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=_PROBE_SECONDS, check=False
    )


def probe_provider(name: str, run: Run = run_command) -> Provider:
    """Try one provider in a process of its own, and read the reason from its log where it fails."""
    try:
        done = run([sys.executable, "-P", str(Path(__file__).with_name("provider_probe.py")), name])
    except (OSError, subprocess.SubprocessError) as error:
        return Provider(name, False, f"the probe did not end: {error}")
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        usable, said = bool(answer["usable"]), " ".join(str(answer["reason"]).split())
    except (IndexError, KeyError, TypeError, ValueError):
        usable, said = False, f"the probe ended with code {done.returncode}"
    if usable:
        return Provider(name, True)
    logged = _log_reason(done.stderr)
    return Provider(name, False, said if logged in said else f"{said}; {logged}" if said else logged)


def _log_reason(log: str) -> str:
    """Return the sentence of ONNX Runtime's log that names the missing library, or its last error."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log)
    if missing := re.search(r"with error: ([^\n]+)", text):
        return missing[1].strip()
    errors = re.findall(r"\[E:onnxruntime[^\]]*\] ([^\n]+)", text)
    lines = errors or [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""

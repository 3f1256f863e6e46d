"""Profiles the dense and the routed model with ONNX Runtime's profiler, and sums the time by operator."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from irc.bench.measure import Workload, state_after_past
from irc.bench.scenario import Load, Scenario
from irc.bench.timed_models import ExportedModel
from irc.deployment.forced import open_forced
from irc.runtime.session import Runtime

_REPEATS = 3
_CONTROL_FLOW = ("If", "Loop")  # not counted: the nodes inside them are counted already


def profile_operators(scenario: Scenario, load: Load, ops: str) -> list[dict[str, Any]]:
    """Profile a prefill and steps of decoding, at the first batch size and prompt length.

    Args:
        scenario: The models.
        load: What to run.
        ops: Kernels of our operators.

    Returns:
        For each model and phase: `model`, `phase`, `sparsity` and `operators`, a list of `name`, `calls` and `ms` for
        one prefill or one step, sorted by time, largest first.
    """
    batch, profiles = load.batches[0], []
    sparsity = None if scenario.share is None else scenario.share.mean
    for phase in ("prefill", "decode"):
        workload = scenario.workload(batch, load.prefill[0] if phase == "prefill" else 1, load)
        for name, folder in (("dense", scenario.pair.dense), ("routed", scenario.pair.routed)):
            forced = scenario.forced and name == "routed"
            trace = scenario.work / f"profile-{name}-{phase}"
            opened = open_forced if forced else Runtime
            runtime = opened(folder, scenario.provider, ops=ops, profile=trace)
            runs = _run(ExportedModel(runtime, forced), workload, phase)
            operators = time_by_operator(runtime.end_profile(), runs)
            profiles.append({"model": name, "phase": phase, "sparsity": sparsity, "operators": operators})
    return profiles


def _run(model: ExportedModel, workload: Workload, phase: str) -> int:
    """Run a phase; return how many of the session's last runs belong to it."""
    if phase == "prefill":
        for _ in range(_REPEATS):
            model.step(workload.prompt, model.empty(len(workload.prompt)), workload.prompt_gates)
        return _REPEATS
    state = state_after_past(model, workload)
    for index, token in enumerate(workload.tokens):
        state = model.step(token, state, workload.gates_of_step(index))
    return len(workload.tokens)


def time_by_operator(trace: Path, runs: int) -> list[dict[str, Any]]:
    """Sum the time of a trace by operator, and delete the trace.

    Args:
        trace: JSON file that ONNX Runtime's profiler wrote.
        runs: Number of runs to count, from the end of the trace.

    Returns:
        `name`, `calls` and `ms` (milliseconds) per run for each operator, sorted by time, largest first.
    """
    milliseconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    events = json.loads(trace.read_text())
    first = sorted(event["ts"] for event in events if event["name"] == "model_run")[-runs]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= first:
            operator = event["args"]["op_name"]
            if operator not in _CONTROL_FLOW:
                milliseconds[operator] += event["dur"] / 1e3
                calls[operator] += 1
    trace.unlink()
    order = sorted(milliseconds, key=milliseconds.__getitem__, reverse=True)
    return [{"name": name, "calls": calls[name] / runs, "ms": milliseconds[name] / runs} for name in order]

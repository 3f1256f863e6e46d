"""Where the time goes: ONNX Runtime's own profile of the dense and of the routed model, summed by operator."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from irc.bench.measure import Work, begun
from irc.bench.scenario import Load, Stage
from irc.bench.timed_models import OurModel
from irc.runtime.session import Runtime

_REPEATS = 3
_CONTROL = ("If", "Loop")  # their time is that of the nodes inside, which are counted by themselves


def where_time_goes(stage: Stage, load: Load, ops: str) -> list[dict[str, Any]]:
    """Profile a prefill and steps of decoding, at the first batch size and length.

    Args:
        stage: The models.
        load: What is run.
        ops: Kernels of our operators.

    Returns:
        For each model and phase: `model`, `phase`, `sparsity` and `operators`, a list of `name`, `calls` and `ms` of
        one prefill or one step, largest first.
    """
    batch, found = load.batches[0], []
    for phase in ("prefill", "decode"):
        work = stage.work_of(batch, load.prefill[0] if phase == "prefill" else 1, load)
        for name, folder in (("dense", stage.pair.dense), ("routed", stage.pair.routed)):
            forced = stage.forced and name == "routed"
            trace = stage.work / f"profile-{name}-{phase}"
            runtime = Runtime(folder, stage.provider, forced=forced, ops=ops, profile=trace)
            runs = _run(OurModel(runtime, forced), work, phase)
            share = None if stage.share is None else stage.share.mean
            place = {"model": name, "phase": phase, "sparsity": share}
            found.append({**place, "operators": summed(runtime.end_profile(), runs)})
    return found


def _run(model: OurModel, work: Work, phase: str) -> int:
    """Run a phase, in decoding after the past; return how many runs of the session count, the last ones."""
    if phase == "prefill":
        for _ in range(_REPEATS):
            model.step(work.prompt, model.empty(len(work.prompt)), work.gates)
        return _REPEATS
    state = begun(model, work)
    for index, token in enumerate(work.tokens):
        state = model.step(token, state, None if work.steps is None else work.steps[index])
    return len(work.tokens)


def summed(trace: Path, runs: int) -> list[dict[str, Any]]:
    """Sum the kernels of a trace that ONNX Runtime wrote, by operator, and remove it.

    Args:
        trace: JSON file.
        runs: How many of the session's runs count: the last ones.
    """
    milliseconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    events = json.loads(trace.read_text())
    first = sorted(event["ts"] for event in events if event["name"] == "model_run")[-runs]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= first:
            operator = event["args"]["op_name"]
            if operator not in _CONTROL:
                milliseconds[operator] += event["dur"] / 1e3
                calls[operator] += 1
    trace.unlink()
    order = sorted(milliseconds, key=milliseconds.__getitem__, reverse=True)
    return [{"name": name, "calls": calls[name] / runs, "ms": milliseconds[name] / runs} for name in order]

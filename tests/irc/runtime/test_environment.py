"""Versions, conflicting wheels, and providers that are listed but do not work."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from exporters.onnx_dtypes import FP32
from irc.cli import main
from irc.runtime import environment, provider_probe
from irc.runtime.one_node import one_node_model
from irc.runtime.provider import Provider, probe_provider

Result = subprocess.CompletedProcess[str]


def lookup(**versions: str) -> Callable[[str], str]:
    """Return a lookup that knows these distributions alone; an underscore stands for a hyphen."""
    known = {name.replace("_", "-"): version for name, version in versions.items()}

    def find(name: str) -> str:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    return find


def answers(stdout: str, stderr: str = "", code: int = 0) -> Callable[[Sequence[str]], Result]:
    return lambda command: subprocess.CompletedProcess(command, code, stdout, stderr)


def test_both_wheels_are_a_conflict_with_a_remedy() -> None:
    found = environment.onnxruntime_distributions(lookup(onnxruntime="1.31.1", onnxruntime_gpu="1.31.1"))
    warning = environment.conflict_warning(found)
    assert warning is not None
    assert warning.startswith("onnxruntime and onnxruntime-gpu are installed together")
    assert warning.endswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu")


@pytest.mark.parametrize("versions", [{}, {"onnxruntime": "1.31.1"}, {"onnxruntime_gpu": "1.31.1"}])
def test_one_wheel_or_none_is_no_conflict(versions: dict[str, str]) -> None:
    found = environment.onnxruntime_distributions(lookup(**versions))
    assert set(found) == {name.replace("_", "-") for name in versions}
    assert environment.conflict_warning(found) is None


def test_without_onnxruntime_there_are_no_providers_and_no_probe() -> None:
    def run(command: Sequence[str]) -> Result:
        raise AssertionError("a probe was started")

    assert environment.onnxruntime_providers({}, run) == ((), ())


def test_a_hollow_onnxruntime_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace())
    providers, warnings = environment.onnxruntime_providers({"onnxruntime": "1.31.1"})
    assert providers == ()
    assert len(warnings) == 1
    assert "cannot be used" in warnings[0]


def test_the_probe_s_model_is_what_its_comment_says() -> None:
    """It is written down as bytes: neither the runtime nor the probe imports onnx."""
    assert one_node_model("Add", ("x", "x"), "y", FP32.code, 1, {}) == provider_probe._MODEL
    model = onnx.load_from_string(provider_probe._MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Add"]


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    found = environment.ask_torch()
    assert found.reason == ""
    assert found.threads is not None
    answer = {"build": "13.0", "devices": [["GPU", "9.0", 80, 70]], "threads": 3}
    told = environment.ask_torch(answers(f"noise\n{json.dumps(answer)}\n"))
    assert told == environment.Torch("13.0", (environment.CudaDevice("GPU", "9.0", 80, 70),), 3)
    described = environment.cuda(told, answers("580.1\n"))
    assert (described.build, described.devices, described.reason) == ("13.0", told.devices, "")


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (answers("", "ImportError: libtorch.so\n", 1), "libtorch.so"),
        (answers("", "", -11), "-11"),
        (answers("[]"), "0"),
    ],
    ids=["broken", "crashed", "spoke"],
)
def test_torch_that_does_not_run_is_a_reason(run: Callable[[Sequence[str]], Result], reason: str) -> None:
    found = environment.ask_torch(run)
    assert reason in found.reason
    assert found.threads is None
    assert environment.cuda(found, run).reason == found.reason


def test_a_machine_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "version", lambda name: None)
    found = environment.ask_torch(lambda command: pytest.fail("a probe was started"))
    assert found.reason == "torch is not installed"


LOG = (
    "\x1b[1;31m2026-01-01 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] FAIL : Failed to load "
    "library libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared object file\n\x1b[m"
)
FELL_BACK = "ONNX Runtime silently fell back to CPUExecutionProvider"


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (answers('noise\n{"usable": true, "reason": ""}\n', LOG), Provider("P", True)),
        (
            answers(json.dumps({"usable": False, "reason": FELL_BACK}), LOG),
            Provider("P", False, f"{FELL_BACK}; libcublasLt.so.13: cannot open shared object file"),
        ),
        (answers('{"usable": false, "reason": "two\\nlines"}'), Provider("P", False, "two lines")),
        (answers("", code=-11), Provider("P", False, "the probe ended with code -11")),
        (answers("no json", "last words\n", 1), Provider("P", False, "the probe ended with code 1; last words")),
    ],
    ids=["works", "fell back", "raised", "crashed", "spoke"],
)
def test_a_probe_tells_why(run: Callable[[Sequence[str]], Result], expected: Provider) -> None:
    assert probe_provider("P", run) == expected


def test_a_probe_that_hangs_is_not_usable() -> None:
    def run(command: Sequence[str]) -> Result:
        raise subprocess.TimeoutExpired(command, 1)

    provider = probe_provider("P", run)
    assert provider.usable is False
    assert "did not end" in provider.reason


def test_the_cpu_provider_works_and_an_unknown_one_does_not() -> None:
    pytest.importorskip("onnxruntime")
    assert probe_provider("CPUExecutionProvider") == Provider("CPUExecutionProvider", True)
    assert probe_provider("NoSuchExecutionProvider").usable is False


def test_env_reports_a_machine_without_onnxruntime(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "onnxruntime_distributions", dict)
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["onnxruntime"] == {}
    assert report["providers"] == []
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert report["cpu"]["usable"] >= 1
    assert report["cpu"]["memory_total"] > 2**28
    assert main(["env"]) == 0
    assert "onnxruntime: not installed" in capsys.readouterr().out


def test_env_warns_of_both_wheels_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(environment, "onnxruntime_distributions", lambda: both)
    monkeypatch.setattr(environment, "onnxruntime_providers", lambda found: ((), ()))
    assert main(["env", "--json"]) == 0
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)["warnings"]) == 1
    assert "warning: onnxruntime and onnxruntime-gpu are installed together" in shown.err


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, None),
        ({"": ("max", 5)}, None),
        ({"": (900, 400)}, (900, 500)),
        ({"job": (900, 400), "": ("max", 1)}, (900, 500)),
        ({"job/step": (800, 100), "job": (700, 600)}, (700, 100)),
        ({"elsewhere": (1, 1)}, None),
        ({"": (900, 1000)}, (900, 0)),
    ],
    ids=["none", "no limit", "a container", "a job", "nested", "another", "beyond"],
)
def test_memory_is_what_the_control_groups_leave(
    tmp_path: Path, groups: dict[str, tuple[object, int]], expected: tuple[int, int] | None
) -> None:
    for name, (limit, used) in groups.items():
        write(tmp_path / "sys/fs/cgroup" / name, max=limit, current=used + 50, stat="anon 7\ninactive_file 50\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemFree: 1 kB\nMemAvailable:   2 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/x\n0::/job/step\n")
    total, available = environment.memory(tmp_path)
    assert (total, available) == (expected or (environment.memory(tmp_path / "nothing")[0], 2048))


def test_memory_in_a_container_of_version_1(tmp_path: Path) -> None:
    write(tmp_path / "sys/fs/cgroup/memory", limit_in_bytes=900, usage_in_bytes=400, stat="total_inactive_file 100\n")
    assert environment.memory(tmp_path) == (900, 600)
    write(tmp_path / "sys/fs/cgroup/memory", limit_in_bytes=0x7FFFFFFFFFFFF000)
    assert environment.memory(tmp_path)[0] == environment.memory(tmp_path / "nothing")[0]


def write(group: Path, **values: object) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (group / f"memory.{name}").write_text(f"{value}\n")

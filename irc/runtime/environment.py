"""What `irc env` reports: versions, devices, and the execution providers that really work."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "onnx",
    "onnxscript",
)
ORT_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-qnn",
    "onnxruntime-training",
    "ort-nightly",
    "ort-nightly-gpu",
)
"""Distributions that all install the one import package `onnxruntime`, over each other's files."""

_PROBE_SECONDS = 180

Lookup = Callable[[str], str]
"""From a distribution's name to its version; raises PackageNotFoundError."""

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]
"""Runs a command and returns its output as text; raises OSError or SubprocessError."""


@dataclass(frozen=True)
class Provider:
    """One execution provider of ONNX Runtime.

    Attributes:
        name: Its name in ONNX Runtime.
        usable: Whether it ran a node; None where that was not tried.
        reason: Why it is not usable, or was not tried.
    """

    name: str
    usable: bool | None
    reason: str = ""


@dataclass(frozen=True)
class CudaDevice:
    """One GPU that torch sees; memory in bytes."""

    name: str
    compute_capability: str
    memory_total: int
    memory_free: int


@dataclass(frozen=True)
class Cuda:
    """What torch says about CUDA, and the reason where it sees no device."""

    build: str | None
    driver: str | None
    devices: tuple[CudaDevice, ...]
    reason: str = ""


@dataclass(frozen=True)
class Cpu:
    """CPUs this process may use and those of the machine, memory in bytes, torch's threads."""

    usable: int
    total: int
    memory_total: int | None
    memory_available: int | None
    torch_threads: int


@dataclass(frozen=True)
class Environment:
    """All that `irc env` shows; what is not installed is None: versions, `native` (for the CPU), `native_cuda`."""

    platform: str
    versions: Mapping[str, str | None]
    onnxruntime: Mapping[str, str]
    providers: tuple[Provider, ...]
    cuda: Cuda
    cpu: Cpu
    native: Mapping[str, object] | None = None
    native_cuda: Mapping[str, object] | None = None
    warnings: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, object]:
        """Return it with plain dictionaries and lists, for JSON."""
        return asdict(self)


def inspect_environment() -> Environment:
    """Look at everything; takes some seconds, since it imports torch and starts ONNX Runtime once a provider."""
    runtimes = onnxruntime_distributions()
    providers, warnings = onnxruntime_providers(runtimes)
    (native, problem), (native_cuda, cuda_problem) = native_operators(), native_operators("cuda")
    conflict = conflict_warning(runtimes)
    return Environment(
        platform=platform.platform(),
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        onnxruntime=runtimes,
        providers=providers,
        cuda=cuda(),
        cpu=cpu(),
        native=native,
        native_cuda=native_cuda,
        warnings=((conflict,) if conflict else ()) + warnings + tuple(each for each in (problem, cuda_problem) if each),
    )


def native_operators(provider: str = "cpu") -> tuple[Mapping[str, object] | None, str]:
    """Describe a provider's installed operator library, None where there is none; and say why it cannot be loaded."""
    from irc.errors import InputError
    from irc.runtime.native import installed_library

    try:
        library = installed_library(provider)
    except InputError as error:
        return None, str(error)
    return (asdict(library) | {"path": str(library.path)} if library else None), ""


def version(name: str, lookup: Lookup = importlib.metadata.version) -> str | None:
    """Return a distribution's version, or None where it is not installed."""
    try:
        return lookup(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def onnxruntime_distributions(lookup: Lookup = importlib.metadata.version) -> dict[str, str]:
    """Return the installed distributions of ONNX Runtime and their versions."""
    found = {name: version(name, lookup) for name in ORT_DISTRIBUTIONS}
    return {name: number for name, number in found.items() if number is not None}


def conflict_warning(distributions: Mapping[str, str]) -> str | None:
    """Return a warning with its remedy where several distributions overwrite each other, else None."""
    if len(distributions) < 2:
        return None
    names = list(distributions)
    wanted = next((name for name in names if "gpu" in name), names[0])
    return (
        f"{' and '.join(names)} are installed together and overwrite each other's files, which breaks the GPU "
        f"provider; keep one: pip uninstall -y {' '.join(names)} && pip install {wanted}"
    )


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with its output captured as text, for at most three minutes."""
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=_PROBE_SECONDS, check=False
    )


def onnxruntime_providers(
    distributions: Mapping[str, str], run: Run = run_command
) -> tuple[tuple[Provider, ...], tuple[str, ...]]:
    """List the execution providers and try each on a one-node model.

    Args:
        distributions: What `onnxruntime_distributions` found.
        run: Starts a probe.

    Returns:
        The providers, in ONNX Runtime's order of preference, and a warning where it cannot be imported.
    """
    if not distributions:
        return (), ()
    try:
        names: list[str] = importlib.import_module("onnxruntime").get_available_providers()
    except Exception as error:
        return (), (f"onnxruntime is installed but cannot be used ({error}); install it again",)
    if version("onnx") is None:
        why = "not tried: onnx is not installed (pip install onnx)"
        return tuple(Provider(name, None, why) for name in names), ()
    return tuple(probe_provider(name, run) for name in names), ()


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


def cuda(run: Run = run_command) -> Cuda:
    """Ask torch for its CUDA devices and the driver tool for the driver's version."""
    import torch

    build = torch.version.cuda
    driver = _driver_version(run)
    if not torch.cuda.is_available():
        reason = "torch is a build without CUDA" if build is None else "torch finds no CUDA device or no driver"
        return Cuda(build, driver, (), reason)
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        devices.append(CudaDevice(properties.name, f"{properties.major}.{properties.minor}", total, free))
    return Cuda(build, driver, tuple(devices))


def _driver_version(run: Run) -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = run([tool, "--query-gpu=driver_version", "--format=csv,noheader"])
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def cpu() -> Cpu:
    """Count CPUs, memory (a container's limit where there is one) and torch's threads."""
    import torch

    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    memory_total, memory_available = _memory()
    return Cpu(usable, total, memory_total, memory_available, torch.get_num_threads())


def _memory() -> tuple[int | None, int | None]:
    """Return total and available memory in bytes, None where the system does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None, None
    available = None
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists() and (line := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        available = int(line[1]) * 1024
    limit, used = (_integer(group / name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        total = limit
        available = min(available or limit, limit - (used or 0))
    return total, available


def _integer(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None

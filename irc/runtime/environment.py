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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from irc.errors import InputError
from irc.runtime.native import installed_library
from irc.runtime.provider import Provider, Run, probe_provider, run_command

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

Lookup = Callable[[str], str]
"""From a distribution's name to its version; raises PackageNotFoundError."""


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
    """CPUs for this process and of the machine, memory in bytes, torch's threads (None without torch)."""

    usable: int
    total: int
    memory_total: int | None
    memory_available: int | None
    torch_threads: int | None


@dataclass(frozen=True)
class Environment:
    """All that `irc env` shows; versions, `native` (for the CPU) and `native_cuda` are None where not installed."""

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
    """Look at everything; torch and each provider of ONNX Runtime are tried in processes of their own, side by side."""
    runtimes = onnxruntime_distributions()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(ask_torch)
        providers, warnings = onnxruntime_providers(runtimes)
        torch = asked.result()
    (native, problem), (native_cuda, cuda_problem) = native_operators(), native_operators("cuda")
    found = (conflict_warning(runtimes), *warnings, problem, cuda_problem)
    return Environment(
        platform=platform.platform(),
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        onnxruntime=runtimes,
        providers=providers,
        cuda=cuda(torch),
        cpu=cpu(torch.threads),
        native=native,
        native_cuda=native_cuda,
        warnings=tuple(warning for warning in found if warning),
    )


def native_operators(provider: str = "cpu") -> tuple[Mapping[str, object] | None, str]:
    """Describe a provider's installed operator library, None where there is none; and say why it cannot be loaded."""
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
    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(lambda name: probe_provider(name, run), names)), ()


@dataclass(frozen=True)
class Torch:
    """What torch says in a process of its own.

    Attributes:
        build: Version of CUDA that it is built with, None for a build without CUDA.
        devices: The GPUs that it sees.
        threads: Its threads, None where it does not run.
        reason: Why it does not run.
    """

    build: str | None = None
    devices: tuple[CudaDevice, ...] = ()
    threads: int | None = None
    reason: str = ""


def ask_torch(run: Run = run_command) -> Torch:
    """Ask torch for its build, devices and threads, without importing it here."""
    if version("torch") is None:
        return Torch(reason="torch is not installed")
    try:
        done = run([sys.executable, "-P", str(Path(__file__).with_name("torch_probe.py"))])
    except (OSError, subprocess.SubprocessError) as error:
        return Torch(reason=f"the probe of torch did not end: {error}")
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        devices = tuple(CudaDevice(*device) for device in answer["devices"])
        return Torch(answer["build"], devices, int(answer["threads"]))
    except (IndexError, KeyError, TypeError, ValueError):
        said = (done.stderr.strip() or f"it ended with code {done.returncode}").splitlines()[-1]
        return Torch(reason=f"torch cannot be used ({said[:200]})")


def cuda(torch: Torch, run: Run = run_command) -> Cuda:
    """Combine what torch says of CUDA with the version that the driver's tool gives."""
    reason = torch.reason
    if not reason and not torch.devices:
        without = "torch is a build without CUDA"
        reason = without if torch.build is None else "torch finds no CUDA device or no driver"
    return Cuda(torch.build, _driver_version(run), torch.devices, reason)


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


def cpu(torch_threads: int | None) -> Cpu:
    """Count CPUs and memory (a container's limit where there is one)."""
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    memory_total, memory_available = memory()
    return Cpu(usable, total, memory_total, memory_available, torch_threads)


def memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Return total and available memory in bytes, within the limits of a container; None where the system does not say.

    Args:
        root: Folder that holds `proc` and `sys`.
    """
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None, None
    available = None
    meminfo = root / "proc/meminfo"
    if meminfo.exists() and (line := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        available = int(line[1]) * 1024
    for limit, used in _limits(root):
        if limit < total:
            total = limit
        available = min(total if available is None else available, max(0, limit - used))
    return total, available


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the memory limit of each control group of this process, and what counts against it, in bytes."""
    groups, own = root / "sys/fs/cgroup", ""
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    inner = groups / own
    found = [(group, "max", "current") for group in (inner, *inner.parents) if group.is_relative_to(groups)]
    for group, most, now in (*found, (groups / "memory", "limit_in_bytes", "usage_in_bytes")):  # version 1 last
        limit, used = (_integer(group / f"memory.{name}") for name in (most, now))
        if limit is not None and used is not None:
            yield limit, used - _droppable(group / "memory.stat")


def _droppable(statistics: Path) -> int:
    """Return the bytes of file pages that a control group would drop for new memory, such as read weights."""
    with suppress(OSError):
        if line := re.search(r"^(?:total_)?inactive_file (\d+)$", statistics.read_text(), re.MULTILINE):
            return int(line[1])
    return 0


def _integer(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None

"""`irc env`: what this machine and this installation can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from irc.cli.options import common_options

if TYPE_CHECKING:
    from irc.runtime.environment import Environment


@click.command()
@common_options
def command(as_json: bool) -> None:
    """Show versions, devices and execution providers, and whether they really work.

    Each execution provider of ONNX Runtime runs a model of one node, because a provider that is listed may
    still fail to load and silently be replaced by the CPU.
    """
    from irc import console
    from irc.runtime.environment import inspect_environment

    environment = inspect_environment()
    for warning in environment.warnings:
        console.warn(warning)
    if as_json:
        console.emit_json(environment.as_dict())
    else:
        _show(environment)


def _show(environment: Environment) -> None:
    from irc import console

    installed = {name: number or "not installed" for name, number in environment.versions.items()}
    runtimes = dict(environment.onnxruntime) or {"onnxruntime": "not installed"}
    usable = {True: "usable", False: "not usable"}
    providers = {
        each.name: f"{usable[each.usable]}{f' ({each.reason})' if each.reason else ''}"
        for each in environment.providers
    }
    native: Mapping[str, Any] | None = environment.native
    kernels = {provider: ", ".join(types) for provider, types in native["providers"].items()} if native else {}
    if native:
        kernels["cuda"] = _cuda_kernels(environment.native_cuda)
    cpu, cuda = environment.cpu, environment.cuda
    devices = {
        f"{index} {each.name}": f"{_gib(each.memory_total)}, {_gib(each.memory_free)} free, "
        f"compute capability {each.compute_capability}"
        for index, each in enumerate(cuda.devices)
    }
    content: dict[str, object] = {
        "platform": environment.platform,
        "versions": installed | runtimes,
        "execution providers": providers or "none: ONNX Runtime is not usable",
        "native operators": {"version": f"{native['version']}, {native['instruction_set']}"} | kernels
        if native
        else "not installed: portable ones are used",
        "CUDA": {"torch build": cuda.build or "none", "driver": cuda.driver or "none"}
        | (devices or {"devices": f"none: {cuda.reason}"}),
        "CPU": {
            "cores": f"{cpu.usable} usable of {cpu.total}",
            "memory": f"{_gib(cpu.memory_total)}, {_gib(cpu.memory_available)} available",
            "torch threads": "unknown" if cpu.torch_threads is None else cpu.torch_threads,
        },
    }
    console.tree("environment", content)


def _cuda_kernels(library: Mapping[str, Any] | None) -> str:
    from irc.runtime.native import UNTRIED

    if library is None:
        return "none: nvcc was not found when the package was built"
    types = ", ".join(library["providers"]["cuda"])
    return f"{types} for {library['instruction_set']}, CUDA {library['cuda']}; {UNTRIED}"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"

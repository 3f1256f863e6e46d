"""Check and time routed models on an NVIDIA GPU, and print all tables.

    python examples/bench_gpu.py [--shape llama-3.1-8b] [--layers 32] [-o FOLDER]

Needs onnxruntime-gpu and a CUDA build of torch. Without a GPU it prints what it would run and exits. The script

1. compares each operator on CUDA with the eager operator, on random shapes: bit for bit, or up to rounding for
   products; with the portable bodies and, if they are installed, with the native kernels;
2. measures the ceilings of the card, the rates of bf16 matrix products and of copies;
3. compares the logits of the demo model on CUDA with those on the CPU;
4. times the dense and the routed model in fp16 with random gates: prefill of 2,048 and 8,192 tokens, and decoding at
   batch sizes 1, 8 and 32 after 2,048 tokens. Native kernels that failed the check are not timed.

It writes results.json and results.md to FOLDER.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

SPARSITIES = (0.25, 0.5, 0.7)
PREFILL, PAST, BATCHES = (2048, 8192), 2048, (1, 8, 32)
GOALS = {"prefill": {1: 0.94}, "decode": {1: 0.90, 8: 0.85, 32: 0.80}}
PLAN = f"""No GPU found. With one, this script would
  1. compare each operator on CUDA, portable and native, with the eager operator on random shapes,
  2. measure the rates of bf16 matrix products and of copies,
  3. compare the logits of the demo model on CUDA with those on the CPU,
  4. time a Llama of the shape in fp16, dense and routed with {", ".join(f"{s:.0%}" for s in SPARSITIES)} skipped:
     prefill of {" and ".join(map(str, PREFILL))} tokens, decoding at batch {", ".join(map(str, BATCHES))} after {PAST},
  5. write results.json and results.md."""


def kernels(provider: str = "CUDAExecutionProvider") -> dict[str, list[dict[str, Any]]]:
    """Check the operators; return, for each kind of kernels, a result for each operator and data type."""
    from dataclasses import asdict

    from irc.bench.kernels.check import check_kernels
    from irc.runtime.native import installed_library

    library = installed_library("cuda")
    paths = {"portable": None} | ({"native": library.path} if library else {})
    results = {}
    for kind, path in paths.items():
        results[kind] = [asdict(result) for result in check_kernels(path, provider, cases=60)]
    return results


def native_is_right(results: dict[str, list[dict[str, Any]]]) -> bool:
    """Return whether native kernels are installed and all their cases were right."""
    return "native" in results and not any(result["wrong"] for result in results["native"])


def ceilings() -> dict[str, float]:
    """Return the rates of bf16 matrix products (FLOP/s) and of memory (bytes/s), each the best of ten runs."""
    import torch

    def best_rate(run: Any, amount: float) -> float:
        taken = []
        for _ in range(13):
            torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        return amount / min(taken[3:])

    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return {
        "gemm_flops_per_s": best_rate(lambda: a @ b, 2.0 * size**3),
        "bytes_per_s": best_rate(lambda: target.copy_(source), 2.0 * source.numel()),
    }


def correctness(work: Path, native: bool) -> dict[str, Any]:
    """Compare the logits of an untrained demo bundle on CUDA (fp32 and fp16) with those on the CPU (fp32).

    All runs follow the same gates. TF32 is off, because its rounding would hide smaller errors.

    Args:
        work: A folder for the models.
        native: Whether to run the native kernels as well.
    """
    import numpy as np

    from irc.bench.models import bundle_pair
    from irc.bench.precision import precision_named
    from irc.bundle.saving import save_bundle
    from irc.deployment.forced import open_forced
    from irc.model.build import build_routed, default_spec
    from irc.model.checkpoint import find_base

    base = find_base("demo")
    model = build_routed(base, default_spec(base.config.hidden_size))
    save_bundle(model, work / "demo")
    draw = np.random.default_rng(0)
    ids = draw.integers(0, base.config.vocab_size, (3, 96))
    execute = draw.random((len(model.units), 3, 96)) >= 0.4
    found: dict[str, Any] = {}
    logits = {}
    runs = [("cpu", "fp32", "portable"), ("cuda", "fp32", "portable"), ("cuda", "fp16", "portable")]
    runs += [("cuda", "fp32", "native"), ("cuda", "fp16", "native")] if native else []
    for provider, dtype, ops in runs:
        pair = bundle_pair(
            str(work / "demo"), work / f"{provider}-{dtype}-{ops}", precision_named(dtype, provider), None, provider
        )
        runtime = open_forced(pair.routed, provider, ops=ops, tf32=False)
        cache, parts = runtime.empty_cache(3), []
        for first, last in ((0, 80), (80, 81), (81, 96)):  # a prompt, one token, several tokens
            mask = np.ones((3, last), np.int64)
            parts.append(runtime.step(ids[:, first:last], mask, cache, execute[:, :, first:last]).logits)
        logits[provider, dtype, ops] = np.concatenate(parts, 1)
        difference = np.abs(logits[provider, dtype, ops] - logits["cpu", "fp32", "portable"]).max()
        found[f"{provider} {dtype} {ops}"] = {
            "ops": runtime.ops,
            "largest difference from cpu fp32": float(difference),
        }
    return found


def speed(shape_name: str, layers: int, rounds: int, ops: Sequence[str]) -> dict[str, Any]:
    """Time a model of a shape; return the result of `irc.bench.bench`."""
    from irc import console
    from irc.bench import BenchOptions, Load, Share, Subject, bench
    from irc.bench.shapes import shape_named

    shape = shape_named(shape_name)
    shape = replace(shape, layers=layers or shape.layers)
    load = Load(prefill=PREFILL, decode_batches=BATCHES, past=PAST, decode=32, rounds=rounds)
    shares = [Share(share, share) for share in SPARSITIES]
    return bench(Subject(shape), shares, load, console.progress, BenchOptions("cuda", "fp16", ops))


def tables(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [f"{key}: {value}  " for key, value in result["machine"].items()]
    lines += ["", *(f"{key}: {value:.3g}  " for key, value in result["ceilings"].items())]
    lines += ["", "| kernels | operator | data type | wrong cases | reason |", "|---|---|---|---|---|"]
    for kind, entries in result["kernels"].items():
        for entry in entries:
            wrong = f"{entry['wrong']} of {entry['cases']}"
            lines.append(f"| {kind} | {entry['operator']} | {entry['dtype']} | {wrong} | {entry['reason']} |")
    lines += ["", "| run | operators | largest difference of logits |", "|---|---|---|"]
    for name, found in result["correctness"].items():
        lines.append(f"| {name} | {found['ops']} | {found['largest difference from cpu fp32']:.2e} |")
    lines += ["", "| phase | tokens | batch | skipped | operators | dense ms | routed ms | speed-up | ideal |"]
    lines[-1] += " efficiency | goal |"
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in result["speed"]["results"]:
        dense, goal = row["contenders"]["dense"], GOALS[row["phase"]][row["batch"]]
        for name in (name for name in row["contenders"] if name != "dense"):
            routed = row["contenders"][name]
            figures = [f"{dense['ms']:.2f}", f"{routed['ms']:.2f}"]
            figures += [f"{routed[key]:.3f}" for key in ("speedup", "ideal", "efficiency")]
            place = [row["phase"], str(row["tokens"]), str(row["batch"]), f"{row['realized']:.1%}", name]
            lines.append(f"| {' | '.join([*place, *figures, f'{goal:.2f}'])} |")
    lines += ["", "| dense | tokens | batch | share of the ceiling | goal |", "|---|---|---|---|---|"]
    first = [row for row in result["speed"]["results"] if row["sparsity"] == SPARSITIES[0]]
    for row in first:
        unit, least = ("flops_per_s", 0.6) if row["phase"] == "prefill" else ("bytes_per_s", 0.7)
        ceiling = result["ceilings"]["gemm_flops_per_s" if unit == "flops_per_s" else unit]
        share = row[f"dense_{unit}"] / ceiling
        lines.append(f"| {row['phase']} | {row['tokens']} | {row['batch']} | {share:.3f} | {least:.2f} |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, str]:
    """Return GPU, driver, versions and date."""
    import onnxruntime
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    return {
        "GPU, driver": answer.stdout.strip() or torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=0, help="Number of layers; 0 for as many as the shape has.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/bench-gpu"))
    arguments = parser.parse_args()
    import torch

    from irc import console

    if not torch.cuda.is_available():
        console.say(PLAN)
        return
    result: dict[str, Any] = {"machine": machine(), "kernels": kernels()}
    native = native_is_right(result["kernels"])
    result["ceilings"] = ceilings()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        result["correctness"] = correctness(Path(work), native)
    console.say(json.dumps(result, indent=1))  # printed now in case the timing is interrupted
    result["speed"] = speed(
        arguments.shape, arguments.layers, arguments.rounds, ("portable", "native") if native else ("portable",)
    )
    (arguments.output / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "results.md").write_text(tables(result))
    console.say(tables(result))


if __name__ == "__main__":
    main()

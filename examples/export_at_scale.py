"""Export a Llama of 1B shape with random weights, dense and routed, and print size, time and peak memory.

    python examples/export_at_scale.py             # 5 GB of disk for bf16, 7.5 GB for fp32; --dtypes int4 for less

Each `irc export` runs in its own process. The peak is Linux's VmHWM, which includes mapped files.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from capture_at_scale import write_random_model

EXPORT = """
import sys
from pathlib import Path
from irc.cli import main
code = main(sys.argv[1:])
print(Path("/proc/self/status").read_text(), file=sys.stderr)
sys.exit(code)
"""


def write_random_bundle(base: Path, bundle: Path) -> None:
    """Save a bundle of a checkpoint with untrained routers and forecasters."""
    from irc.bundle.saving import save_bundle
    from irc.model.build import build_routed, default_spec
    from irc.model.checkpoint import find_base

    found = find_base(str(base))
    model = build_routed(found, default_spec(found.config.hidden_size), "bf16")
    save_bundle(model, bundle)


def measure(source: Path, output: Path, dtype: str) -> tuple[float, float, float]:
    """Export a model; return the GB of its weights, the seconds taken, and the peak memory in GB."""
    import json

    command = [sys.executable, "-c", EXPORT, "export", str(source), "-o", str(output), "--dtype", dtype, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    assert peak, "this example needs Linux, because it reads /proc"
    weights = (output / "model.onnx.data").stat().st_size
    return weights / 1e9, json.loads(done.stdout)["seconds"]["export"], int(peak[1]) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32", "int4"], help="Data types to export in.")
    dtypes = parser.parse_args().dtypes
    from irc import console

    rows = []
    with tempfile.TemporaryDirectory() as work:
        base, bundle, output = (Path(work) / name for name in ("base", "bundle", "onnx"))
        write_random_model(base, "llama-3.2-1b")
        write_random_bundle(base, bundle)
        stored = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 1e9
        for name, source in (("dense", base), ("routed", bundle)):
            for dtype in dtypes:
                weights, seconds, peak = measure(source, output, dtype)
                subprocess.run(["rm", "-r", str(output)], check=True)
                rows.append(
                    [f"{name}, {dtype}", *(f"{x:.2f}" for x in (weights, seconds, peak, peak / weights, peak / stored))]
                )
    headings = ["model", "weights GB", "seconds", "peak GB", "peak / weights", "peak / bf16 base"]
    console.table("export, 1B shape", headings, rows)


if __name__ == "__main__":
    main()

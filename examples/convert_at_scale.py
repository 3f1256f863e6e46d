"""Convert, evaluate and export a Llama of a real size with random weights; print time and peak memory of each phase.

    python examples/convert_at_scale.py                           # Llama-3.2-1B's shape: 6 GB of disk below build/
    python examples/convert_at_scale.py --shape my/config.json    # a Llama of your own shape
    python examples/convert_at_scale.py --shape llama-3.1-8b --until lff    # 34 GB of disk, 3.3 GB of memory

Each command runs in its own process, on text of the Python standard library. The memory of that process is read from
Linux ten times per second: resident memory in total, private memory, and mapped memory (pages of weight files and
libraries, which the system can reclaim). The columns peak at different times, so the last two may add up to more than
the first. All files are removed at the end.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from capture_at_scale import SHAPES, write_random_model
from export_at_scale import write_random_bundle

TEXT_CHARACTERS = 600_000
FIELDS = {"VmRSS": "resident", "RssAnon": "private", "RssFile": "mapped"}
Peaks = dict[str, float]


def settings(tokens: int, batch: int, steps: int) -> list[str]:
    """Return the flags of a conversion with few steps."""
    values = {
        "sparsity": 0.25,
        "lff.steps": steps,
        "lff.batch_size": batch,
        "lff.tokens": tokens,
        "router.steps": steps,
        "router.batch_size": batch,
        "router.teach_steps": steps,
        "router.calibration_tokens": tokens,
        "eval_tokens": tokens,
        "yardstick_tokens": tokens,
    }
    flags = []
    for name, value in values.items():
        flags += ["--set", f"{name}={value}"]
    return flags


def write_text(path: Path) -> None:
    """Write the beginning of the Python standard library's sources."""
    from irc.text.source import load_text

    parts, size = [], 0
    for document in load_text("stdlib").documents:
        parts.append(document.text)
        size += len(document.text)
        if size > TEXT_CHARACTERS:
            break
    path.write_text("\n".join(parts), encoding="utf-8")


def add_tokenizer(folder: Path) -> None:
    """Copy the tokenizer of the demo model to a folder."""
    from irc.model.checkpoint import find_base

    for path in find_base("demo").folder.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)


def observe(process: int) -> Peaks:
    """Return the memory of a process in GB and its processor seconds so far, or nothing if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    seen = {"cpu": sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")}
    for line in lines:
        key, _, value = line.partition(":")
        if key in FIELDS:
            seen[FIELDS[key]] = int(value.split()[0]) * 1024 / 1e9
    return seen


def run(*arguments: str, until: str = "") -> list[tuple[str, float, Peaks]]:
    """Run `irc` in a process and measure it.

    Args:
        *arguments: Arguments of the command line.
        until: Phase after which the process is terminated; empty to let it finish.

    Returns:
        For each phase, and at the end for the whole process: its name, seconds and peaks.
    """
    started = time.monotonic()
    command = [sys.executable, "-m", "irc", *arguments, "--debug", "--json"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    phases: list[tuple[str, float, Peaks]] = []
    phase_peaks: Peaks = {}
    total_peaks: Peaks = {}
    log: list[str] = []

    def listen() -> None:
        nonlocal phase_peaks
        assert child.stderr is not None
        for line in child.stderr:
            log.append(line)
            ended = re.search(r"phase (\w+) ended after ([\d.]+) s", line)
            if ended and ended[1] != "stages":  # each stage is logged as well
                cpu_before = sum(peaks["cpu"] for _, _, peaks in phases)
                peaks = phase_peaks | {"cpu": total_peaks["cpu"] - cpu_before}
                phases.append((f"{arguments[0]}: {ended[1]}", float(ended[2]), peaks))
                phase_peaks = {}
                print(*row(*phases[-1]), file=sys.stderr)  # shows the progress of a long run
                if ended[1] == until:
                    child.terminate()

    listener = threading.Thread(target=listen)
    listener.start()
    while child.poll() is None:
        for key, value in observe(child.pid).items():
            for peaks in (phase_peaks, total_peaks):
                peaks[key] = max(peaks.get(key, 0.0), value)
        time.sleep(0.1)
    listener.join()
    if child.returncode and not (until and phases and phases[-1][0].endswith(f" {until}")):
        sys.exit("".join(log[-20:]))
    return [*phases, (arguments[0], time.monotonic() - started, total_peaks)]


def row(name: str, seconds: float, seen: Peaks) -> list[str]:
    """Return a line of the table."""
    return [name, f"{seconds:.1f}", f"{seen['cpu']:.1f}", *(f"{seen.get(key, 0):.2f}" for key in FIELDS.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", help=f"{', '.join(SHAPES)}, or a config.json.")
    parser.add_argument("--folder", type=Path, default=Path("build/at-scale"), help="Work folder; removed at the end.")
    parser.add_argument("--steps", type=int, default=10, help="Steps per stage (teaching, lff, router).")
    parser.add_argument("--batch", type=int, default=4, help="Windows per step.")
    parser.add_argument("--seq-len", type=int, default=128, help="Tokens per window.")
    parser.add_argument("--tokens", type=int, default=2048, help="Tokens for statistics, threshold, texts, each.")
    parser.add_argument(
        "--until", choices=["lff", "end"], default="end", help="lff: stop converting there; export untrained routers."
    )
    given = parser.parse_args()
    from irc import console

    if given.folder.exists():
        sys.exit(f"{given.folder}: exists already; give another --folder")
    base, text, bundle, onnx = (given.folder / name for name in ("base", "text.txt", "bundle", "onnx"))
    try:
        base.mkdir(parents=True)
        write_random_model(base, given.shape)
        add_tokenizer(base)
        write_text(text)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 1e9
        common = ["--data", str(text), "--seq-len", str(given.seq_len), "--device", "cpu", "--dtype", "bf16"]
        flags = settings(given.tokens, given.batch, given.steps)
        convert = ["convert", str(base), "-o", str(bundle), *common, *flags]
        if given.until == "end":
            rows = [*run(*convert), *run("eval", str(bundle), "--tokens", str(given.tokens), *common)]
        else:
            rows = run(*convert, until=given.until)
            write_random_bundle(base, bundle)
        rows += run("export", str(bundle), "-o", str(onnx), "--dtype", "bf16")
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)
    table = [row(*phase) for phase in rows]
    step = f"{given.steps} steps of {given.batch} x {given.seq_len} tokens"
    columns = ["phase", "seconds", "processor seconds", *(f"{name} GB" for name in FIELDS.values())]
    console.table(f"{Path(given.shape).name}: {size:.2f} GB of weights, {step}", columns, table)


if __name__ == "__main__":
    main()

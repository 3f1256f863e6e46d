"""Convert, evaluate and export a Llama of real size with random weights; print time and peak memory of each phase.

    python examples/convert_at_scale.py                           # Llama-3.2-1B's shape: 6 GB of disk below build/
    python examples/convert_at_scale.py --shape my/config.json    # a Llama of a shape of your own
    python examples/convert_at_scale.py --shape llama-3.1-8b --until lff    # 34 GB of disk, 3.3 GB of memory

Each of the three is the command of that name in a process of its own, on a text of the Python standard library. Memory
is what Linux says of that process, read ten times a second: resident in all, private (what the process itself holds),
and mapped (pages of the weights' files and of libraries, which the system takes back when it needs them). Each column
has a peak of its own, so that the last two may add up to more than the first. What is written is removed in the end.
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
    """Return the recipe of a conversion of few steps, as flags."""
    stages = [f"{stage}.{key}={value}" for stage in ("lff", "router") for key, value in
              (("steps", steps), ("batch_size", batch))]  # fmt: skip
    chosen = [f"router.teach_steps={steps}", f"lff.tokens={tokens}", f"router.calibration_tokens={tokens}"]
    return [flag for setting in [*stages, *chosen, f"eval_tokens={tokens}"] for flag in ("--set", setting)]


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
    """Put the demo model's tokenizer beside random weights."""
    from irc.model.checkpoint import find_base

    for path in find_base("demo").folder.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)


def observe(process: int) -> Peaks:
    """Return what a process holds now, in GB, and its processor seconds so far; nothing where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        spent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    found = (line.split(":", 1) for line in lines if ":" in line)
    held = {FIELDS[key]: int(value.split()[0]) * 1024 / 1e9 for key, value in found if key in FIELDS}
    return held | {"cpu": sum(map(int, spent)) / os.sysconf("SC_CLK_TCK")}


def run(*arguments: str, until: str = "") -> list[tuple[str, float, Peaks]]:
    """Run `irc` in a process; returns its phases, each with its seconds and peaks, the whole process last.

    Args:
        *arguments: Of the command line.
        until: The phase after which it is ended.
    """
    started = time.monotonic()
    command = [sys.executable, "-m", "irc", *arguments, "--debug", "--json"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    phases: list[tuple[str, float, Peaks]] = []
    now: Peaks = {}
    whole: Peaks = {}
    said: list[str] = []

    def listen() -> None:
        nonlocal now
        assert child.stderr is not None
        for line in child.stderr:
            said.append(line)
            ended = re.search(r"phase (\w+) ended after ([\d.]+) s", line)
            if ended and ended[1] != "stages":  # which are told one by one
                before = sum(peaks["cpu"] for _, _, peaks in phases)
                phases.append((f"{arguments[0]}: {ended[1]}", float(ended[2]), now | {"cpu": whole["cpu"] - before}))
                now = {}
                print(*row(*phases[-1]), file=sys.stderr)  # a run of an hour says how far it is
                if ended[1] == until:
                    child.terminate()

    listener = threading.Thread(target=listen)
    listener.start()
    while child.poll() is None:
        for key, value in observe(child.pid).items():
            for peaks in (now, whole):
                peaks[key] = max(peaks.get(key, 0.0), value)
        time.sleep(0.1)
    listener.join()
    if child.returncode and not (until and phases and phases[-1][0].endswith(f" {until}")):
        sys.exit("".join(said[-20:]))
    return [*phases, (arguments[0], time.monotonic() - started, whole)]


def row(name: str, seconds: float, seen: Peaks) -> list[str]:
    """Return a line of the table."""
    return [name, f"{seconds:.1f}", f"{seen['cpu']:.1f}", *(f"{seen.get(key, 0):.2f}" for key in FIELDS.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", help=f"{', '.join(SHAPES)}, or a config.json.")
    parser.add_argument("--folder", type=Path, default=Path("build/at-scale"), help="Where it is written; removed.")
    parser.add_argument("--steps", type=int, default=10, help="Steps a stage (teaching, lff, router).")
    parser.add_argument("--batch", type=int, default=4, help="Windows a step.")
    parser.add_argument("--seq-len", type=int, default=128, help="Tokens a window.")
    parser.add_argument("--tokens", type=int, default=2048, help="Of statistics, threshold and evaluation, each.")
    parser.add_argument(
        "--until", choices=["lff", "end"], default="end", help="lff: end converting there; export untrained routers."
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

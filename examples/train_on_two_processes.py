"""Convert a model on one process and on two, and compare the weights, which differ only by the order of sums.

    python examples/train_on_two_processes.py

`irc convert` runs under torchrun without changes (and under accelerate, see the README). Each process takes its share
of each batch. Data order and routing noise depend only on seed and step, so two processes draw the same as one. On
GPUs, leave `--device cpu` out. On several machines, pass torchrun their number and the address of the first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from tiny_llama import model_and_text

SETTINGS = (
    "lff.tokens=16384 lff.steps=10 router.steps=20 router.teach_steps=5 router.calibration_tokens=16384 "
    "eval_tokens=8192 yardstick_tokens=0 precision=fp32"
).split()
TORCHRUN = "torch.distributed.run --standalone --nproc-per-node 2 -m irc".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/two-processes"))
    output = parser.parse_args().output
    model, text = model_and_text()
    flags = [flag for setting in SETTINGS for flag in ("--set", setting)]
    adapters = []
    for name, module in (("one", ["irc"]), ("two", TORCHRUN)):
        bundle = output / f"{name}-bundle"
        command = [sys.executable, "-m", *module, "convert", str(model), "-o", str(bundle), "--data", str(text)]
        command += ["--seq-len", "128", "--device", "cpu", "--force", *flags]
        print(" ".join(["python", *command[1:]]), flush=True)
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        adapters.append(load_file(bundle / "irc_adapter.safetensors"))
    one, two = adapters
    largest = max(float((one[name] - two[name]).abs().max()) for name in one)
    print(f"largest difference of {len(one)} weight tensors between one process and two: {largest:.1e}")
    sys.exit(0 if largest < 1e-4 else 1)


if __name__ == "__main__":
    main()

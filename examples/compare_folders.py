"""Time two exports of the same model in turns, in one process: for example ours and another builder's.

    irc export MODEL -o ours
    python -m onnxruntime_genai.models.builder -m MODEL -o theirs -p fp32 -e cpu -c cache
    python examples/compare_folders.py ours theirs

Both need the inputs of Hugging Face exports (input_ids, attention_mask, past_key_values.N.key and .value) in fp32, and
a genai_config.json. The script prints medians, and the time of the first folder over that of the second. Below 1, the
first is faster.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path)
    parser.add_argument("--prefill", type=int, default=512, help="Tokens of the prompt.")
    parser.add_argument("--decode", type=int, default=32, help="Steps of one token after it.")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    from irc import console
    from irc.bench.timed_models import GenaiModel

    models = [GenaiModel(folder) for folder in arguments.folders]
    draw = np.random.default_rng(0)
    prompt, token = draw.integers(0, 1000, (1, arguments.prefill)), draw.integers(0, 1000, (1, 1))
    logits = [model.run(prompt, model.empty(1))[0].numpy() for model in models]
    seconds: dict[str, list[list[float]]] = {"prefill": [[], []], "decode": [[], []]}
    for _ in range(arguments.rounds):
        for index, model in enumerate(models):
            started = time.perf_counter()
            _, *past = model.run(prompt, model.empty(1))
            seconds["prefill"][index].append(time.perf_counter() - started)
            started = time.perf_counter()
            for _ in range(arguments.decode):
                _, *past = model.run(token, past)
            seconds["decode"][index].append((time.perf_counter() - started) / arguments.decode)
    rows = []
    for name, (first, second) in seconds.items():
        ours, theirs = float(np.median(first)), float(np.median(second))
        rows.append([name, f"{1e3 * ours:.2f}", f"{1e3 * theirs:.2f}", f"{ours / theirs:.3f}"])
    console.table(
        f"{arguments.folders[0].name} and {arguments.folders[1].name}, medians",
        ["", "first, ms", "second, ms", "first / second"],
        rows,
    )
    console.say(f"largest difference between the logits of the prompt: {np.abs(logits[0] - logits[1]).max():.2e}")


if __name__ == "__main__":
    main()

"""Time two exported models of one shape in turns, in one process: ours against another builder's output.

    irc export MODEL -o ours
    python -m onnxruntime_genai.models.builder -m MODEL -o theirs -p fp32 -e cpu -c cache
    python examples/compare_folders.py ours theirs

Both need the inputs that Hugging Face exports have (input_ids, attention_mask, past_key_values.N.key and .value), in
fp32, and a genai_config.json.
Printed are medians, and the first folder's time over the second's; below 1 the first is faster.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np


class Timed:
    """A session of a folder's `model.onnx` on the CPU, with ONNX Runtime's own settings."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        self.shape = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
        self.past = [i.name for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self.outputs = ["logits", *(name.replace("past_key_values", "present") for name in self.past)]

    def run(self, ids: Any, past: list[Any]) -> list[Any]:
        """Return logits and the cache, which stay in ONNX Runtime's memory."""
        binding = self.session.io_binding()
        length = past[0].shape()[2] + ids.shape[1]
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, length), np.int64))
        for name, tensor in zip(self.past, past, strict=True):
            binding.bind_ortvalue_input(name, tensor)
        for name in self.outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        results: list[Any] = binding.get_outputs()
        return results

    def empty(self) -> list[Any]:
        """Return the cache of a text that has not begun."""
        import onnxruntime as ort

        return [ort.OrtValue.ortvalue_from_numpy(np.zeros(self.shape, np.float32)) for _ in self.past]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=Path)
    parser.add_argument("--prefill", type=int, default=512, help="Tokens of the prompt.")
    parser.add_argument("--decode", type=int, default=32, help="Steps of one token after it.")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    from irc import console

    models = [Timed(folder) for folder in arguments.folders]
    draw = np.random.default_rng(0)
    prompt, token = draw.integers(0, 1000, (1, arguments.prefill)), draw.integers(0, 1000, (1, 1))
    logits = [model.run(prompt, model.empty())[0].numpy() for model in models]
    seconds: dict[str, list[list[float]]] = {"prefill": [[], []], "decode": [[], []]}
    for _ in range(arguments.rounds):
        for index, model in enumerate(models):
            started = time.perf_counter()
            _, *past = model.run(prompt, model.empty())
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
        f"{arguments.folders[0].name} against {arguments.folders[1].name}, medians",
        ["", "first, ms", "second, ms", "first / second"],
        rows,
    )
    console.say(f"largest difference of the prompt's logits: {np.abs(logits[0] - logits[1]).max():.2e}")


if __name__ == "__main__":
    main()

"""Export a bundle to ONNX and generate with ONNX Runtime alone: the prompt, then one token at a time with a cache.

    python examples/export_and_run.py                    # converts a tiny model first
    python examples/export_and_run.py --bundle BUNDLE --prompt "def main():"

`Decoder` shows all that another program needs: onnxruntime, numpy and the folder. Routed units are nodes of domain
`irc`. Their function bodies are in the same file, so a stock ONNX Runtime can run them. The script compares the tokens
with those of PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from tiny_llama import converted

import irc
from irc.deployment.onnx_folder import ExportOptions, export

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Decoder:
    """Greedy decoding of an exported folder."""

    def __init__(self, folder: Path) -> None:
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def generate(self, ids: list[int], count: int) -> list[int]:
        """Append the most likely token to token ids, `count` times."""
        past = {name: self.empty(name) for name in self.inputs if name.startswith("past_key_values.")}
        new, all_ids, length = ids, list(ids), 0
        for _ in range(count):
            length += len(new)
            feed = {"input_ids": np.array([new]), "attention_mask": np.ones((1, length), dtype=np.int64)}
            results = dict(zip(self.outputs, self.session.run(None, feed | past), strict=True))
            past = {name: results[name.replace("past_key_values.", "present.")] for name in past}
            new = [int(results["logits"][0, -1].argmax())]
            all_ids += new
        return all_ids

    def empty(self, name: str) -> np.ndarray:
        """Return an empty cache: batch 1, and length 0."""
        value = self.inputs[name]
        sizes = [1, *(size if isinstance(size, int) else 0 for size in value.shape[1:])]
        return np.zeros(sizes, TYPES[value.type])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/your-own/onnx"))
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--prompt", default="def read(")
    parser.add_argument("--tokens", type=int, default=40)
    arguments = parser.parse_args()
    bundle = arguments.bundle or converted()
    facts = export(str(bundle), arguments.output, ExportOptions(force=True))
    print(f"exported {facts['routed_units']} routed units, {facts['bytes'] / 1e6:.1f} MB, to {arguments.output}")
    model = irc.load(bundle)
    tokenizer = model.base.tokenizer
    ids = tokenizer(arguments.prompt)["input_ids"]
    generated = Decoder(arguments.output).generate(ids, arguments.tokens)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([ids]), max_new_tokens=arguments.tokens, do_sample=False, eos_token_id=None
        )
    print(tokenizer.decode(generated))
    same = generated == expected[0].tolist()
    print(f"ONNX Runtime and PyTorch give {'the same tokens' if same else 'different tokens'}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()

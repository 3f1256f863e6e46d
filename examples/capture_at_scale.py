"""Capture and rewrite Llamas of real sizes with random weights, and print the time and peak memory of each.

    python examples/capture_at_scale.py            # 1B from safetensors shards (2.5 GB of disk), 8B on meta

Each measurement runs in its own process, so that the peaks do not mix. The 1B model is first written as bf16 shards;
the time to read them is reported separately. Capturing and rewriting do not touch the weights. The last column is the
peak after every page of the weights has been touched, as in training.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig

SHARD_BYTES = 1_000_000_000
SHAPES = {
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256, "tie_word_embeddings": False,
    },
}  # fmt: skip


def shape_config(shape: str) -> LlamaConfig:
    """Return the configuration of a named shape or of a config.json."""
    from transformers import LlamaConfig

    if shape in SHAPES:
        return LlamaConfig(**SHAPES[shape], max_position_embeddings=131_072, dtype="bfloat16")
    if not Path(shape).is_file():
        sys.exit(f"{shape}: no such file or shape; give a config.json or one of {', '.join(SHAPES)}")
    return LlamaConfig.from_json_file(shape)


def write_random_model(folder: Path, shape: str) -> None:
    """Write a checkpoint of random bf16 weights in safetensors shards, with at most one shard in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    config = shape_config(shape)
    config.save_pretrained(folder)
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, meta in wanted.items():
        if shard and sum(2 * tensor.numel() for tensor in shard.values()) + 2 * meta.numel() > SHARD_BYTES:
            write()
        ones = torch.ones(meta.shape, dtype=torch.bfloat16)
        shard[name] = ones if meta.dim() == 1 else ones.normal_(0, config.initializer_range, generator=generator)
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def measure(shape: str, folder: Path | None) -> dict[str, float]:
    """Capture and rewrite a model, with a folder also assign and touch all weights; return seconds and GB."""
    import torch
    from transformers import LlamaConfig

    from irc.model.build import default_spec
    from irc.model.capture import assign_weights, capture
    from irc.model.checkpoint import BaseModel
    from irc.model.modules import Forecaster, Mux, Router, RoutingControl, router_hidden
    from passes.base import PassManager
    from passes.insert_forecasters import InsertForecasters
    from passes.insert_routers import InsertRouters

    before = _peak()
    base = BaseModel(shape, folder) if folder else None
    started = time.monotonic()
    if base:
        base.check_finite()  # reads every weight once, as `irc convert` does
    reading = time.monotonic() - started
    captured = capture(base.config if base else LlamaConfig(**SHAPES[shape]), torch.bfloat16)
    weights = base.weights() if base else {}
    if base:
        assign_weights(captured, weights)
    config = captured.config
    spec, control = default_spec(config.hidden_size), RoutingControl()
    device = torch.device("cpu" if folder else "meta")
    with device:
        torch.set_default_dtype(torch.bfloat16)
        passes = [
            InsertForecasters(
                lambda unit: Forecaster(unit.width, spec.rank_of(unit)),
                lambda unit: Mux(unit.name, control),
            ),
            InsertRouters(lambda unit: Router(unit.width, router_hidden(unit.width, spec.rank))),
        ]
        PassManager(passes).run(captured.graph)
    seconds = time.monotonic() - started - reading
    peak = _peak()
    for tensor in weights.values():
        tensor.flatten()[:: 4096 // tensor.element_size()].max()  # reads one element per page to load all weights
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    return {
        "seconds": seconds,
        "reading": reading,
        "peak": peak / 1e9,
        "resident": _peak() / 1e9,
        "import_peak": before / 1e9,
        "weights": size / 1e9,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _in_own_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", nargs=2, metavar=("SHAPE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs="+", metavar="SHAPE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_random_model(Path(arguments.write[1]), arguments.write[0])
        return
    if arguments.measure:
        folder = Path(arguments.measure[1]) if len(arguments.measure) > 1 else None
        print(json.dumps(measure(arguments.measure[0], folder)))
        return
    from irc import console

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        _in_own_process("--write", "llama-3.2-1b", folder)
        found = _in_own_process("--measure", "llama-3.2-1b", folder)
        rows.append(["llama-3.2-1b, bf16 shards", found])
    rows.append(["llama-3.1-8b, meta device", _in_own_process("--measure", "llama-3.1-8b")])
    console.table(
        "capture and rewrite, random weights",
        ["model", "seconds", "reading weights", "weights GB", "peak GB", "peak / weights", "all in memory"],
        [
            [
                name,
                f"{f['seconds']:.1f}",
                f"{f['reading']:.1f}",
                f"{f['weights']:.2f}",
                f"{f['peak']:.2f}",
                f"{f['peak'] / f['weights']:.3f}" if f["weights"] else "-",
                f"{f['resident'] / f['weights']:.3f}" if f["weights"] else "-",
            ]
            for name, f in rows
        ],
    )


if __name__ == "__main__":
    main()

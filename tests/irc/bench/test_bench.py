"""`irc bench`, and the forced decisions that it relies on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import irc
from irc.bench.ideal_speedup import ideal_decode_speedup
from irc.bench.precision import Precision, precision_named
from irc.bench.profile import time_by_operator
from irc.bench.shapes import Shape, shape_named
from irc.bench.text import heldout_tokens
from irc.deployment.forced import open_forced
from irc.errors import InputError
from irc.model.flops import head_flops, unit_flops
from irc.runtime.native import installed_library
from irc.runtime.session import Runtime

FP32 = Precision("fp32", "fp32")
SIZES = "--hidden 64 --layers 1 --ffn 96 --heads 4 --kv-heads 2 --past 8 --decode 2 --rounds 2".split()


def has_native() -> bool:
    return installed_library() is not None


def test_forced_decisions_take_the_routers_place(exported: Path, dense: Path) -> None:
    """With every unit executed, the logits are those of the dense model, and the routers' logits do not change."""
    ids, mask = np.arange(12).reshape(2, 6), np.ones((2, 6), np.int64)
    runtimes = [Runtime(dense), open_forced(exported), Runtime(exported)]
    execute = np.ones((4, 2, 6), bool)
    plain = runtimes[0].step(ids, mask, runtimes[0].empty_cache(2))
    forced = runtimes[1].step(ids, mask, runtimes[1].empty_cache(2), execute)
    free = runtimes[2].step(ids, mask, runtimes[2].empty_cache(2))
    np.testing.assert_allclose(forced.logits, plain.logits, atol=1e-4)
    assert forced.execute is execute
    np.testing.assert_allclose(forced.difference[0], free.difference[0], atol=1e-5)
    assert 0 < free.execute.mean() < 1
    same = runtimes[1].step(ids, mask, runtimes[1].empty_cache(2), free.execute)
    np.testing.assert_allclose(same.logits, free.logits, atol=1e-5)


def test_bench_prints_what_it_measured(irc_main: Callable[..., Any], tmp_path: Path) -> None:
    flags = "--sparsities 0,0.1/0.9 --batch 1,2 --decode-batch 1,3 --prefill 32,16 --ops native,portable --profile"
    flags += " --peers static,hf-eager"
    if not has_native():
        flags = flags.replace("native,portable", "portable")
    plot = tmp_path / "speed.svg"
    shown = irc_main("bench", *flags.split(), "--provider", "cpu", "--json", "--plot", str(plot), *SIZES)
    assert shown.code == 0, shown.err
    result = shown.json
    places = [(row["phase"], row["sparsity"], row["batch"], row["tokens"]) for row in result["results"]]
    prompts = [("prefill", batch, length) for batch in (1, 2) for length in (32, 16)]
    phases = [*prompts, ("decode", 1, 8), ("decode", 3, 8)]
    assert places == [(name, share, batch, n) for share in (0, 0.5) for name, batch, n in phases]
    for row in result["results"]:
        figures = row["contenders"]
        ours = {"native", "portable"} if has_native() else {"portable"}
        assert set(figures) == {"dense", "static", "hf-eager"} | ours
        for name, entry in figures.items():
            assert entry["speedup"] == pytest.approx(figures["dense"]["ms"] / entry["ms"])
            read = row["batch"] * (row["tokens"] if row["phase"] == "prefill" else 1)
            assert entry["tokens_per_s"] == pytest.approx(1e3 * read / entry["ms"])
            assert entry["spread"] >= 0
            assert ("efficiency" in entry) == (name in ours | {"static"})
            if "efficiency" in entry:
                assert entry["efficiency"] == pytest.approx(entry["speedup"] / entry["ideal"])
        weights = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 64 * 4096  # Q and O, K and V, the FFN, the head
        if row["phase"] == "prefill":
            scores = 4 * (row["tokens"] + 1) / 2 * 64
            done = row["dense_flops_per_s"] * figures["dense"]["ms"] / 1e3 / row["tokens"] / row["batch"]
            assert done == pytest.approx(2 * weights + scores)
        else:
            done = row["dense_bytes_per_s"] * figures["dense"]["ms"] / 1e3
            assert done == pytest.approx(4 * (weights + row["batch"] * 2 * (8 + 1 + 1) * 32))
        if row["sparsity"] == 0:
            assert row["realized"] == 0
            assert figures["portable"]["ideal"] < 1
        else:
            assert 0.3 < row["realized"] < 0.7 or row["phase"] == "decode"  # eight draws
            assert figures["static"]["ideal"] == 1.0  # a model of one layer cannot lose any
    assert result["peak_memory_mib"] > 50
    assert result["not_timed"] == {}
    assert [(p["model"], p["phase"], p["sparsity"]) for p in result["profile"]] == [
        (model, phase, share) for share in (0, 0.5) for phase in ("prefill", "decode") for model in ("dense", "routed")
    ]
    for entry in result["profile"]:
        names = [operator["name"] for operator in entry["operators"]]
        assert "MatMul" in names
        assert "If" not in names
        assert ("DecideRows" in names) == (entry["model"] == "routed" and has_native())
        matmul = next(operator for operator in entry["operators"] if operator["name"] == "MatMul")
        assert matmul["calls"] >= 7  # Q, K, V, O, gate, up, down, each once per run
    assert "<svg" in plot.read_text()


def test_a_bundle_is_timed_on_its_own_routes(irc_main: Callable[..., Any], bundle: Path, text_file: Path) -> None:
    load = "--prefill 24 --past 12 --decode 6 --rounds 1 --ops portable".split()
    shown = irc_main("bench", str(bundle), "--data", str(text_file), "--provider", "cpu", "--json", *load)
    assert shown.code == 0, shown.err
    rows = shown.json["results"]
    assert [(row["phase"], row["sparsity"]) for row in rows] == [("prefill", None), ("decode", None)]
    tokens = heldout_tokens(str(bundle), str(text_file))[:24].reshape(1, -1)
    model = irc.load(str(bundle))
    tape: dict[str, Any] = {}
    with torch.no_grad(), model.control.using(tape=tape):
        model(input_ids=torch.from_numpy(tokens), use_cache=False)
    execute = torch.stack([record.execute for record in tape.values()])
    assert rows[0]["realized"] == pytest.approx(1 - execute.float().mean().item(), abs=0.01)
    assert rows[1]["realized"] == pytest.approx(1 - execute[:, :, 12:18].float().mean().item(), abs=0.05)
    assert 0 < rows[0]["realized"] < 1


def test_the_ideal_of_a_step_counts_weights_once_and_caches_by_sequence(bundle: Path) -> None:
    model = irc.load(str(bundle))
    units = len(model.units)
    every, none = np.ones((3, units, 2), bool), np.zeros((3, units, 2), bool)
    one = none.copy()
    one[:, :, 0] = True
    counts = unit_flops(model, 0).values()
    cache = 2 * 2 * (10 + 1) * 2 * 8  # keys and values, two sequences, 11 tokens, 2 heads of 8
    dense = head_flops(model) / 2 + sum((c.always + c.gated) / 2 for c in counts) + 2 * cache
    routers, forecasters = (sum(getattr(c, part) for c in counts) / 2 for part in ("router", "forecaster"))
    assert ideal_decode_speedup(model, every, 10, FP32) == pytest.approx(dense / (dense + routers))
    assert ideal_decode_speedup(model, one, 10, FP32) == pytest.approx(dense / (dense + routers + forecasters - cache))
    gated = sum(c.gated for c in counts) / 2
    assert ideal_decode_speedup(model, none, 10, FP32) == pytest.approx(
        dense / (dense + routers + forecasters - gated - 2 * cache)
    )
    int4 = precision_named("int4", "cpu")  # half a byte, and a scale and half a byte of zero point for 32 numbers
    assert int4.weight_bytes == 0.5 + 4.5 / 32
    weights = (dense - 2 * cache) * int4.weight_bytes
    expected = (weights + 4 * 2 * cache) / (weights + 4 * (2 * cache + routers))
    assert ideal_decode_speedup(model, every, 10, int4) == pytest.approx(expected)


def test_int4_is_timed(irc_main: Callable[..., Any], bundle: Path, text_file: Path) -> None:
    load = "--prefill 24 --past 12 --decode 6 --rounds 1 --ops portable --dtype int4".split()
    shown = irc_main("bench", str(bundle), "--data", str(text_file), "--provider", "cpu", "--json", *load)
    assert shown.code == 0, shown.err
    assert shown.json["dtype"] == "int4"
    assert all(row["contenders"]["portable"]["ideal"] > 0 for row in shown.json["results"])


def test_a_trace_is_summed_by_operator(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    kernels = [(10, "MatMul", 7000), (1010, "MatMul", 300), (1400, "If", 900), (1500, "Add", 50), (2010, "MatMul", 100)]
    events = [
        {"cat": "Node", "name": f"n{start}_kernel_time", "ts": start, "dur": micro, "args": {"op_name": operator}}
        for start, operator, micro in kernels
    ]
    events += [{"cat": "Session", "name": "model_run", "ts": start, "dur": 900} for start in (2000, 0, 1000)]
    trace.write_text(json.dumps(events))
    assert time_by_operator(trace, 2) == [  # the first run, which read the past, is not counted
        {"name": "MatMul", "calls": 1.0, "ms": 0.2},
        {"name": "Add", "calls": 0.5, "ms": 0.025},
    ]
    assert not trace.exists()


def test_shapes_have_names_and_files(model_folder: Path, tmp_path: Path) -> None:
    assert shape_named("llama-3.1-8b") == Shape(4096, 32, 14_336, 32, 8, 128_256)
    assert shape_named(str(model_folder)) == Shape(32, 2, 48, 4, 2, 257)
    assert shape_named(str(model_folder / "config.json")) == shape_named(str(model_folder))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "num_hidden_layers": "two"}))
    with pytest.raises(InputError, match="num_hidden_layers, intermediate_size, num_attention_heads"):
        shape_named(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--sparsities", "0.5,2"), "0.5,2"),
        (("--sparsities", "0.5/x"), "0.5/x"),
        (("--sparsities", ""), "sparsities"),
        (("--hidden", "65"), "hidden 65"),
        (("--shape", "llama-9"), "llama-9"),
        (("--shape", "llama-3.2-1b", "--kv-heads", "2"), "--kv-heads"),
        (("--data", "stdlib"), "--data"),
        (("--batch", ""), "batch"),
        (("--dtype", "int2"), "int8"),  # the choices
        (("--peers", "vllm"), "vllm"),
        (("--ops", "nowhere.so"), "nowhere.so"),
        (("--dtype", "bf16"), "bf16"),
        (("--plot", "/"), "--plot /"),
        (("--shape", "a" * 300), "aaaa"),
        (("nowhere",), "nowhere"),
        (("BUNDLE", "--shape", "llama-3.2-1b"), "--shape"),
        (("BUNDLE", "--peers", "static"), "static"),
        (("BUNDLE", "--sparsities", "0.3"), "0.3"),
        (("BUNDLE", "--prefill", "1000000"), "1000000"),
    ],
)
def test_bench_refuses(
    irc_main: Callable[..., Any], bundle: Path, text_file: Path, arguments: tuple[str, ...], part: str
) -> None:
    words = [str(bundle) if word == "BUNDLE" else word for word in arguments]
    text = ["--data", str(text_file)] if arguments[0] == "BUNDLE" else []
    sizes = SIZES if words[0].startswith("--") and not {"--shape", "--hidden"} & set(words) else []
    shown = irc_main("bench", *words, *text, "--provider", "cpu", *sizes)
    assert shown.code == 2, shown.err
    assert part in shown.err
    assert "Traceback" not in shown.err

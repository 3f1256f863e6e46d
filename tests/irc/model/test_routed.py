"""The rewritten model as users of transformers see it: arguments, outputs, moves, and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from transformers import AutoModelForCausalLM

from irc.bundle.loading import load, open_model
from irc.deployment.onnx_folder import export
from irc.errors import InputError
from irc.model.cache import CACHE_NAME
from irc.model.routed import RoutedForCausalLM
from irc.runtime.generation import Generator
from irc.runtime.session import Runtime


@pytest.fixture
def model(make_routed: Callable[..., RoutedForCausalLM], shake: Any) -> RoutedForCausalLM:
    routed: RoutedForCausalLM = shake(make_routed())
    return routed


@pytest.mark.parametrize("kept", [1, 5, torch.tensor([0, 7, 3])], ids=["last", "last five", "by index"])
def test_logits_of_some_tokens_are_those_of_all(
    model: RoutedForCausalLM, ids: torch.Tensor, kept: int | torch.Tensor
) -> None:
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with torch.no_grad():
        every, some = model(ids, mask), model(ids, mask, logits_to_keep=kept)
        with_loss = model(ids, mask, labels=ids, logits_to_keep=kept)
    index = kept if isinstance(kept, torch.Tensor) else slice(-kept, None)
    torch.testing.assert_close(some.logits, every.logits[:, index], rtol=0, atol=1e-6)
    assert torch.equal(with_loss.logits, every.logits[:, index])
    assert with_loss.loss == model(ids, mask, labels=ids).loss  # of all tokens
    for one, other in zip(some[CACHE_NAME].layers, every[CACHE_NAME].layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def test_generation_computes_logits_of_the_last_token_alone(
    model: RoutedForCausalLM, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    head = model.logits
    monkeypatch.setattr(model, "logits", lambda states: (asked.append(tuple(states.shape)), head(states))[1])
    made = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert asked == [(len(ids), 1, model.config.hidden_size)] * 3
    with torch.no_grad():
        for length in range(ids.shape[1], made.shape[1]):
            assert torch.equal(model(made[:, :length]).logits[:, -1].argmax(-1), made[:, length])


def test_a_tuple_where_one_is_asked_for(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    loss, logits, cache = model(ids, labels=ids, return_dict=False)
    output = model(ids, labels=ids)
    assert (loss == output.loss, torch.equal(logits, output.logits)) == (True, True)
    assert cache.get_seq_length() == ids.shape[1]
    assert len(model(ids, use_cache=False, return_dict=False)) == 1


def test_positions_of_one_row_are_those_of_every_row(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    row = torch.arange(3, 3 + ids.shape[1])[None]
    assert torch.equal(model(ids, position_ids=row).logits, model(ids, position_ids=row.expand_as(ids)).logits)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one dimension": ({"input_ids": torch.tensor([1, 2])}, r"input_ids .*\[2\].*\[batch, tokens\]"),
    "no token": ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, r"input_ids .*\[1, 0\]"),
    "floats": ({"input_ids": torch.ones(1, 2)}, r"input_ids .*float32 \[1, 2\]"),
    "short mask": ({"attention_mask": torch.ones(2, 3)}, r"attention_mask .*\[2, 3\].*\[2, 4\]"),
    "mask of scores": (
        {"attention_mask": torch.ones(2, 1, 4, 4)},
        "attention_mask .*4 dimensions",
    ),
    "other positions": ({"position_ids": torch.ones(2, 3).long()}, r"position_ids .*\[2, 3\].*\[2, 4\]"),
    "embeddings": ({"inputs_embeds": torch.ones(2, 4, 16)}, "inputs_embeds"),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states"),
    "attention weights": ({"output_attentions": True}, "output_attentions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_graph_cannot_take_or_give_is_refused(model: RoutedForCausalLM, case: str) -> None:
    given, named = REFUSED[case]
    with pytest.raises(InputError, match=named):
        model(**{"input_ids": torch.ones(2, 4, dtype=torch.int64)} | given)


def test_a_cache_of_fixed_size_is_refused(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(InputError, match="cache_implementation='static'"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("options", [{"output_hidden_states": True}, {"inputs_embeds": torch.ones(1, 2, 16)}])
def test_generation_refuses_it_too(model: RoutedForCausalLM, ids: torch.Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        model.generate(ids, max_new_tokens=2, **options)


def test_what_is_not_asked_for_is_not_refused(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    unasked = {"output_hidden_states": False, "output_attentions": None, "inputs_embeds": None}
    assert torch.equal(model(ids, **unasked).logits, model(ids).logits)


def test_another_data_type_is_refused_and_changes_nothing(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    before = model(ids).logits
    for change in (model.half, model.bfloat16, lambda: model.to(torch.float64), lambda: model.to("cpu", torch.half)):
        with pytest.raises(InputError, match=r"float32.*dtype='"):
            change()
    assert torch.equal(model.float().to("cpu", torch.float32)(ids).logits, before)


def test_a_move_takes_the_graphs_along(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    def devices(graph: fx.GraphModule) -> set[torch.device]:
        named = [
            value
            for module in graph.modules()
            for node in (getattr(module, "graph", None) or fx.Graph()).nodes
            for value in (*node.args, *node.kwargs.values())
        ]
        return {value for value in named if isinstance(value, torch.device)}

    model.states(ids)  # a part that was cut before
    assert devices(model.graph) == {torch.device("cpu")}
    assert model.to("meta") is model
    assert devices(model.graph) == {torch.device("meta")}
    assert model(ids.to("meta"), logits_to_keep=1).logits.shape == (len(ids), 1, model.config.vocab_size)
    assert model.states(ids.to("meta")).device == torch.device("meta")


def test_the_vocabulary_is_the_base_s(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    weight = model.graph.get_parameter("model.embed_tokens.weight")
    assert torch.equal(model.get_input_embeddings()(ids), weight[ids])
    with pytest.raises(InputError, match="base"):
        model.resize_token_embeddings(300)


def test_a_bundle_is_not_pushed_while_it_is_saved(model: RoutedForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "b", push_to_hub=True)
    assert not (tmp_path / "b").exists()
    model.save_pretrained(tmp_path / "b", push_to_hub=False)
    assert load(tmp_path / "b").spec == model.spec


def test_from_pretrained_loads_what_save_pretrained_saves(
    model: RoutedForCausalLM, ids: torch.Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "b")
    again = RoutedForCausalLM.from_pretrained(tmp_path / "b", dtype="fp32")
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(InputError, match=str(tmp_path)):
        RoutedForCausalLM.from_pretrained(tmp_path)


def with_settings(model_folder: Path, tmp_path: Path, **files: Any) -> Path:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    for name, content in files.items():
        path = folder / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | content))
    return folder


def ends(folder: Path, tmp_path: Path) -> tuple[Any, frozenset[int]]:
    """Return the tokens that end a text in PyTorch, and in an exported folder."""
    model = open_model(str(folder))
    export(str(folder), tmp_path / "onnx")
    return model.generation_config.eos_token_id, Generator(Runtime(tmp_path / "onnx", "cpu")).end


def test_generation_follows_the_generation_config_of_the_base(model_folder: Path, tmp_path: Path) -> None:
    settings = {"eos_token_id": [256, 7], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    folder = with_settings(model_folder, tmp_path, generation_config=settings)
    config, plain = open_model(str(folder)).generation_config, AutoModelForCausalLM.from_pretrained(folder)
    for name in settings:
        assert getattr(config, name) == getattr(plain.generation_config, name) == settings[name]
    assert ends(folder, tmp_path) == ([256, 7], {256, 7})
    ids = torch.arange(8)[None]
    found = open_model(str(folder)).generate(ids, max_new_tokens=40, do_sample=False)
    torch.testing.assert_close(found, plain.generate(ids, max_new_tokens=40, do_sample=False))


def test_without_a_generation_config_the_configuration_decides_on_both_sides(
    model_folder: Path, tmp_path: Path
) -> None:
    folder = with_settings(model_folder, tmp_path, config={"eos_token_id": [256, 9]})
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert ends(folder, tmp_path) == ([256, 9], {256, 9})


@pytest.mark.parametrize("wrong", [-1, 257, 1 << 40])
def test_ids_that_the_embedding_does_not_have_are_refused(
    model: RoutedForCausalLM, ids: torch.Tensor, wrong: int
) -> None:
    """As a tokenizer gives them to which tokens were added without resizing the model."""
    ids[2, 5] = wrong
    for call in (model, model.states, model.generate):
        with pytest.raises(InputError, match=rf"{wrong}\b.*\b256\b"):
            call(ids)


def test_losses_of_the_parts_of_a_batch_add_up_to_that_of_the_batch(
    model: RoutedForCausalLM, ids: torch.Tensor
) -> None:
    """As transformers' Trainer accumulates gradients."""
    labels = ids.clone()
    labels[0, 3:] = -100
    whole = model(ids, labels=labels).loss
    count = (labels[:, 1:] != -100).sum()
    parts = [model(ids[rows], labels=labels[rows], num_items_in_batch=count).loss for rows in (slice(1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), whole)
    assert model(ids, labels=labels, num_items_in_batch=None).loss == whole


def test_a_head_that_was_replaced_is_used_for_the_last_logits_too(model: RoutedForCausalLM, ids: torch.Tensor) -> None:
    """As peft replaces it, after the first generation."""
    before = model(ids, logits_to_keep=1).logits
    model.graph.lm_head = torch.nn.Sequential(model.graph.lm_head, torch.nn.Tanh())
    every = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, every[:, -1:])
    assert (every[:, -1:] - before).abs().max() > 0.1

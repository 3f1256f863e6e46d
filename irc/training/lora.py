"""LoRA on the base's linears, by peft, saved and loaded as a peft folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from irc.errors import InputError
from irc.files.tensors import write_safetensors
from irc.files.untrusted import first_line
from irc.model.routed import RoutedForCausalLM
from irc.recipe.stages import LoraRecipe

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def lora_config(model: RoutedForCausalLM, recipe: LoraRecipe) -> LoraConfig:
    """Return peft's configuration for the recipe's linears inside the model's units.

    Raises:
        InputError: A named linear is nowhere in the units.
    """
    inside = [unit.name for unit in model.units]
    linears = [
        name.removesuffix(".base_layer")  # so is a linear called that carries adapters already
        for name, module in model.graph.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    ]
    names: list[str] = []
    for target in recipe.targets:
        found = [name for name in linears if name.endswith("." + target) and name.rpartition(".")[0] in inside]
        if not found:
            there = {name.rpartition(".")[2] for name in linears if name.rpartition(".")[0] in inside}
            raise InputError(
                f"lora.targets: no linear named {target} in the model's units; choose from {', '.join(sorted(there))}"
            )
        names += found
    return LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=names, task_type="CAUSAL_LM"
    )


def inject_lora(model: RoutedForCausalLM, recipe: LoraRecipe, seed: int) -> None:
    """Put LoRA adapters on the model's linears; only they are trainable afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora_config(model, recipe), model.graph)
    model.train(model.training)  # peft's dropouts are born in training mode
    model.facts["lora"] = recipe


def lora_parameters(model: RoutedForCausalLM) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters by name."""
    return {name: parameter for name, parameter in model.graph.named_parameters() if "lora_" in name}


@contextmanager
def adapters_off(model: RoutedForCausalLM) -> Iterator[None]:
    """Let a model compute as if it had no adapters, for the time of a `with` block."""
    layers = [module for module in model.graph.modules() if isinstance(module, LoraLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def save_lora(model: RoutedForCausalLM, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as peft's own loaders read them."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = model.facts["lora"]
    config = lora_config(model, recipe)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    tensors = {f"{_PREFIX}{name}": tensor.detach().cpu() for name, tensor in _state(model).items()}
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})


def load_lora(model: RoutedForCausalLM, folder: Path, recipe: LoraRecipe) -> None:
    """Put saved adapters on a model.

    Raises:
        InputError: The folder's weights do not fit the model.
    """
    path = folder / WEIGHTS
    try:
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(path).items()}
    except Exception as error:
        raise InputError(f"{path}: missing, truncated or not a safetensors file ({first_line(error)})") from error
    if any(recipe.rank not in tensor.shape for tensor in tensors.values()):
        raise InputError(f"{path}: its rank is not {recipe.rank}, as the recipe has it; it belongs to another recipe")
    expected = _shapes(model, recipe)
    for name in sorted(expected.keys() ^ tensors.keys()):
        missing = "misses" if name in expected else "holds an unknown"
        raise InputError(f"{path}: it {missing} weight {name}; it belongs to another model or recipe")
    for name, tensor in tensors.items():
        if list(tensor.shape) != expected[name]:
            raise InputError(f"{path}: {name} is {list(tensor.shape)}, expected {expected[name]}")
    inject_lora(model, recipe, 0)  # what it allocates is now known to be no more than the file holds
    set_peft_model_state_dict(model.graph, tensors)
    for parameter in lora_parameters(model).values():
        parameter.requires_grad_(False)


def merge_lora(model: RoutedForCausalLM) -> None:
    """Add the adapters to the linears that they adapt, and put the plain linears back."""
    for name, module in list(model.graph.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, leaf = name.rpartition(".")
            setattr(model.graph.get_submodule(parent), leaf, module.get_base_layer())
    model.facts.pop("lora", None)


def _shapes(model: RoutedForCausalLM, recipe: LoraRecipe) -> dict[str, list[int]]:
    """Return the shapes of the adapters that a recipe puts into a model, by their saved names."""
    shapes: dict[str, list[int]] = {}
    for name in lora_config(model, recipe).target_modules or ():
        found = model.graph.get_submodule(name)
        linear = found.get_base_layer() if isinstance(found, LoraLayer) else found
        assert isinstance(linear, nn.Linear)
        shapes[f"{name}.lora_A.weight"] = [recipe.rank, linear.in_features]
        shapes[f"{name}.lora_B.weight"] = [linear.out_features, recipe.rank]
    return shapes


def _state(model: RoutedForCausalLM) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model.graph)
    return state

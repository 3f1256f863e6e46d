"""Puts LoRA adapters on the base's linears with peft, and saves and loads them as a peft folder."""

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
        InputError: No unit contains a linear that the recipe names.
    """
    units = [unit.name for unit in model.units]
    linears: list[str] = []
    for name, module in model.graph.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            path = name.removesuffix(".base_layer")  # peft's name for a linear that already has adapters
            if path.rpartition(".")[0] in units:
                linears.append(path)
    names: list[str] = []
    for target in recipe.targets:
        found = [path for path in linears if path.endswith(f".{target}")]
        if not found:
            known = ", ".join(sorted({path.rpartition(".")[2] for path in linears}))
            raise InputError(f"lora.targets: no unit of the model has a linear '{target}'; choose from {known}")
        names += found
    return LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=names, task_type="CAUSAL_LM"
    )


def inject_lora(model: RoutedForCausalLM, recipe: LoraRecipe, seed: int) -> None:
    """Put LoRA adapters on the model's linears. Afterwards only the adapters are trainable."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora_config(model, recipe), model.graph)
    model.rewritten()
    model.train(model.training)  # peft creates dropout modules in training mode
    model.lora = recipe


def lora_parameters(model: RoutedForCausalLM) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters by name."""
    return {name: parameter for name, parameter in model.graph.named_parameters() if "lora_" in name}


@contextmanager
def adapters_off(model: RoutedForCausalLM) -> Iterator[None]:
    """Turn a model's adapters off inside a `with` block."""
    layers = [module for module in model.graph.modules() if isinstance(module, LoraLayer)]
    disabled_before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, disabled_before, strict=True):
            layer._disable_adapters = disabled


def save_lora(model: RoutedForCausalLM, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` in peft's format."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = model.lora
    assert recipe is not None
    config = lora_config(model, recipe)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    tensors = {f"{_PREFIX}{name}": tensor.detach().cpu() for name, tensor in _state(model).items()}
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})


def load_lora(model: RoutedForCausalLM, folder: Path, recipe: LoraRecipe) -> None:
    """Put saved adapters on a model.

    Args:
        model: Changed in place; the adapters are frozen.
        folder: A folder that `save_lora` wrote.
        recipe: The recipe that the adapters were trained with.

    Raises:
        InputError: The weights are damaged or do not fit the model and recipe.
    """
    path = folder / WEIGHTS
    try:
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(path).items()}
    except Exception as error:
        raise InputError(f"{path}: missing, truncated or not a safetensors file ({first_line(error)})") from error
    if any(recipe.rank not in tensor.shape for tensor in tensors.values()):
        raise InputError(f"{path}: its rank is not {recipe.rank}, the rank in the recipe; use the recipe it belongs to")
    expected = _shapes(model, recipe)
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "has no" if name in expected else "has an unknown"
        raise InputError(f"{path}: {problem} weight {name}; use the model and recipe it belongs to")
    for name, tensor in tensors.items():
        if list(tensor.shape) != expected[name]:
            raise InputError(f"{path}: {name} is {list(tensor.shape)}, expected {expected[name]}")
    inject_lora(model, recipe, 0)  # allocates no more than the file contains, as the checks above have shown
    set_peft_model_state_dict(model.graph, tensors)
    for parameter in lora_parameters(model).values():
        parameter.requires_grad_(False)


def merge_lora(model: RoutedForCausalLM) -> None:
    """Add the adapters to the weights of their linears, and remove the adapters."""
    for name, module in list(model.graph.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, leaf = name.rpartition(".")
            setattr(model.graph.get_submodule(parent), leaf, module.get_base_layer())
    model.rewritten()
    model.lora = None


def _shapes(model: RoutedForCausalLM, recipe: LoraRecipe) -> dict[str, list[int]]:
    """Return the shapes of the adapters that a recipe creates, by the names under which they are saved."""
    shapes: dict[str, list[int]] = {}
    for name in lora_config(model, recipe).target_modules or ():
        module = model.graph.get_submodule(name)
        linear = module.get_base_layer() if isinstance(module, LoraLayer) else module
        assert isinstance(linear, nn.Linear)
        shapes[f"{name}.lora_A.weight"] = [recipe.rank, linear.in_features]
        shapes[f"{name}.lora_B.weight"] = [linear.out_features, recipe.rank]
    return shapes


def _state(model: RoutedForCausalLM) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model.graph)
    return state

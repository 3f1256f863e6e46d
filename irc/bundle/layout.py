"""The files of a bundle. Small, without the base's weights, never a pickle. Imports no torch.

irc_config.json            format version, base and its hash, units, spec, keep ratios and recoverability
irc_adapter.safetensors    routers and forecasters
lora/                      a peft folder, if LoRA was trained
recipe.yaml                the resolved recipe
metrics.json, README.md    measured figures
"""

from __future__ import annotations

from pathlib import Path

CONFIG = "irc_config.json"
ADAPTER = "irc_adapter.safetensors"
LORA = "lora"
RECIPE = "recipe.yaml"
METRICS = "metrics.json"
CARD = "README.md"

FORMAT_VERSION = 1  # bundles of every version up to this one load; tests/data holds one of each


def is_bundle(folder: Path) -> bool:
    """Return whether a folder holds a bundle's configuration."""
    return (folder / CONFIG).is_file()

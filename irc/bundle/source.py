"""Which model a command works on, and how it is opened."""

from __future__ import annotations

from dataclasses import dataclass

from irc.model.checkpoint import BaseModel
from irc.recipe.key_policy import KeyPolicy
from irc.recipe.target import Target, target_of


@dataclass(frozen=True)
class ModelSource:
    """A bundle or a plain model, and how to open it.

    Attributes:
        name: Bundle, model folder, hub id, or demo.
        base: Where a bundle's base model is, if it has moved; or the base itself, if the caller has opened it, so that
            its weights are hashed once.
        dtype: `auto` (a bundle's as it was converted; otherwise fp32, or bf16 for checkpoints over 2 GB), `fp32`,
            `fp16` or `bf16`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        key_policy: Key/value policy that replaces a bundle's own.
        sparsity: Share to skip that replaces a bundle's own, within its dial.
        flops: FLOPs ratio that replaces a bundle's own, within a dial that was made for FLOPs.
        ask_hub: Whether a hub id may be downloaded. False for a name that a file gave and not the user.
        as_stored: Whether large weights stay in their file's type, unless LoRA adapters change them. The model can then
            be exported, but not run.
    """

    name: str
    base: str | BaseModel | None = None
    dtype: str = "auto"
    device: str = "auto"
    key_policy: KeyPolicy | None = None
    sparsity: float | None = None
    ask_hub: bool = True
    flops: float | None = None
    as_stored: bool = False

    @property
    def target(self) -> Target | None:
        """The target that replaces the bundle's own, or None.

        Raises:
            InputError: Both a sparsity and a FLOPs ratio are given.
        """
        return target_of(self.sparsity, self.flops)


def as_source(model: ModelSource | str) -> ModelSource:
    """Return a source; a name alone is opened with the defaults."""
    return model if isinstance(model, ModelSource) else ModelSource(model)

"""The data types that models are timed in: of weights, and of everything else."""

from __future__ import annotations

from dataclasses import dataclass

from exporters.onnx_format import QUANTIZED, Quantization
from irc.dtypes import BYTES
from irc.errors import InputError


@dataclass(frozen=True)
class Precision:
    """How numbers are stored.

    Attributes:
        name: As `--dtype` takes it: `fp32`, `fp16`, `bf16`, `int4` or `int8`.
        computed: Type of activations, cache, routers and forecasters.
        quantization: How the base's weights are stored in blocks; None if they are not.
    """

    name: str
    computed: str
    quantization: Quantization | None = None

    @property
    def bytes(self) -> int:
        """Bytes of a number that is not a weight of the base."""
        return BYTES[self.computed]

    @property
    def weight_bytes(self) -> float:
        """Bytes of a weight of the base, its share of scale and zero point included."""
        how = self.quantization
        if how is None:
            return self.bytes
        zero = 0 if how.symmetric else how.bits / 8
        return how.bits / 8 + (self.bytes + zero) / how.block_size


def precision_named(name: str, provider: str) -> Precision:
    """Return a precision by its name.

    Args:
        name: `fp32`, `fp16`, `bf16`, `int4` or `int8`.
        provider: cpu, or cuda, where quantized models compute in fp16.

    Raises:
        InputError: There is no such precision.
    """
    if name in QUANTIZED:
        return Precision(name, "fp16" if provider == "cuda" else "fp32", Quantization(QUANTIZED[name]))
    if name in BYTES:
        return Precision(name, name)
    raise InputError(f"unknown dtype '{name}'; choose from {', '.join([*BYTES, *QUANTIZED])}", options=("dtype",))

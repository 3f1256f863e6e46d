"""The names that the exporter writes and the runtime reads: files, inputs, outputs, versions.

This file imports neither torch nor onnx, so that a server can read an exported folder without them.
"""

from __future__ import annotations

from dataclasses import dataclass

MODEL, DATA, MANIFEST = "model.onnx", "model.onnx.data", "irc.json"
FORMAT_VERSION = 3
"""Version of an ONNX folder.

1: a unit also names its mask, which a Less and a Not make.
2: a DecideRows makes the decision; the runtime adds logit differences and the first token when it opens the model.
3: the file holds both, and its metadata names the routed units; `source` is relative to the folder.
"""

DOMAIN, VERSION, OPSET = "irc", 1, 23
MODEL_VERSION = 1  # of the model inside the file; what makes two files differ is in `irc.json`
LEAST_ORT = "1.24"  # the first whose Attention of opset 23 takes an empty past
PROVIDERS = ("cpu", "cuda")

PAST, PRESENT = "past_key_values", "present"
PAST_FROM = "attention_mask"  # tells how many tokens came before: caches may have room for more

DIFFERENCES = "irc.logit_differences"
"""Output: the logit differences of all units, float32 [units * batch, tokens]."""

FIRST = "irc.first_token"
"""Input with the default 0: the first token that gets logits, int64 [1]."""

FORCED = "irc.forced_differences"
"""Input of a forced model: what executes, as differences of 1 and -1, float32 [units * batch, tokens]."""

UNITS, IN_PLACE = "irc.units", "irc.cache_in_place"
"""Keys of the model's metadata.

`UNITS` is a JSON list of [unit, name of its logit difference]. `IN_PLACE` is "true" where RoutedAttention serves every
layer, whose native kernel writes to a cache in place, else "false".
"""

REQUEST_OPTIONS = {
    "max_tokens": "TYPE_INT32",
    "temperature": "TYPE_FP32",
    "top_k": "TYPE_INT32",
    "top_p": "TYPE_FP32",
    "seed": "TYPE_INT32",
    "stop": "TYPE_STRING",
    "stream": "TYPE_BOOL",
}
"""Optional inputs of Triton's text model beside the prompt, with Triton's types; they are those of `irc generate`."""


@dataclass(frozen=True)
class CacheShape:
    """Shape of a model's key/value cache.

    Attributes:
        layers: Decoder layers.
        heads: Key/value heads.
        size: Features of a head.
        reduced: Layers that store executed tokens only; their cache has a length and slots of its own.
    """

    layers: int
    heads: int
    size: int
    reduced: tuple[int, ...] = ()


@dataclass(frozen=True)
class Decision:
    """Where a routed model says what it decided.

    Attributes:
        unit: Name of the unit.
        difference: Name of the value that holds its logit differences, float32 [batch, tokens]: below 0 the unit is
            approximated; everything else, NaN too, executes.
    """

    unit: str
    difference: str

    @classmethod
    def of(cls, unit: str) -> Decision:
        """Return the decision of a unit; the name of its value follows from the unit's name."""
        return cls(unit, f"{unit}.logit_difference")


BLOCK_SIZES = (16, 32, 64, 128, 256)
QUANTIZED = {"int4": 4, "int8": 8}
"""Types of quantized weights as `--dtype` takes them, with their bits."""
ROUNDINGS = ("nearest", "gptq")


@dataclass(frozen=True)
class Quantization:
    """How weights are quantized.

    Attributes:
        bits: 4 or 8.
        block_size: Inputs that share a scale, one of `BLOCK_SIZES`.
        symmetric: Whether blocks have a scale alone, and no zero point.
        accuracy_level: How ONNX Runtime computes: 4 with activations rounded to int8, 0 with activations as they are.
        rounding: `nearest`, or `gptq`, which makes up for its errors on calibration text.
    """

    bits: int = 4
    block_size: int = 32
    symmetric: bool = False
    accuracy_level: int = 4
    rounding: str = "nearest"

    @property
    def name(self) -> str:
        """`int4` or `int8`."""
        return f"int{self.bits}"

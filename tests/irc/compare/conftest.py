"""The arguments of a comparison of tiny cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def arguments(convert_arguments: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Give `arguments(output, *more)`: a comparison whose cells take a second each."""

    def make(output: Path, *more: str) -> list[str]:
        made = convert_arguments(output, rank=4, seq_len=16, eval_tokens=256, router__calibration_tokens=512)
        drop = {"--rank", "--seq-len"}
        kept = [a for i, a in enumerate(made) if a not in drop and (i == 0 or made[i - 1] not in drop)]
        return ["compare", *kept[1:], *more]

    return make

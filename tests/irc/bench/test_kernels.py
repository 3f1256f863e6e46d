"""The portable bodies pass the check of kernels on all edge cases, including a batch of zero."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from irc.bench.kernels.check import random_case

CASES = 10
CHECK = f"""
import json
from dataclasses import asdict
from irc.bench.kernels.check import check_kernels
print(json.dumps([asdict(found) for found in check_kernels(None, "CPUExecutionProvider", cases={CASES})]))
"""


def test_the_bodies_are_right_on_the_edges() -> None:
    """Runs in its own process, which an empty maximum once ended by SIGFPE with some numbers of threads."""
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {each["cases"] for each in found} == {CASES}
    # ONNX Runtime's CPU provider does not implement sums and products of bf16.
    wrong = {(each["operator"], each["dtype"]): each["reason"] for each in found if each["wrong"]}
    assert {dtype for _, dtype in wrong} <= {"bf16"}, wrong
    assert all("NOT_IMPLEMENTED" in reason for reason in wrong.values()), wrong


def test_a_batch_of_zero_is_among_the_cases() -> None:
    drawn = [random_case(torch.Generator(), case) for case in range(CASES)]
    assert any(case["batch"] == 0 for case in drawn)

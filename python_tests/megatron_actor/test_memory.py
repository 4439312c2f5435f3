"""An inference-only teacher costs its weights: measured as resident memory, beside the same model with a trainer."""

import json
import subprocess
import sys

import pytest

from foreign import needs_megatron
from ranks import ROOT, TESTS, python_environment

pytestmark = [pytest.mark.slow, needs_megatron]


def bytes_a_parameter(kind: str) -> float:
    command = [sys.executable, str(TESTS / "megatron_actor" / "memory_rank.py"), kind]
    ran = subprocess.run(command, env=python_environment(), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["parameters"] > 50_000_000, "too small to tell the model from the libraries"
    return found["bytes_a_parameter"]


def test_a_bf16_teacher_costs_at_most_2_3_bytes_a_parameter(capsys):
    """Loaded, made a teacher, and after a scoring pass. The same model with DDP and Adam shows that it is measured."""
    teacher, trained = bytes_a_parameter("teacher"), bytes_a_parameter("trained")
    with capsys.disabled():
        print(f"\nresident bytes a parameter, bf16: inference-only {teacher:.2f}, with DDP and Adam {trained:.2f}")
    assert 2.0 <= teacher <= 2.3
    assert trained >= 16.0

"""`make gpu` has eight minutes: under OPD_GPU_SECONDS a test that would begin after that many is skipped by name."""

import contextlib
import os
import subprocess
import time

import pytest

BEGAN = time.monotonic()


def seconds_left() -> float:
    """Infinite where no limit is set."""
    return float(os.environ.get("OPD_GPU_SECONDS", "inf")) - (time.monotonic() - BEGAN)


def pytest_runtest_setup(item):
    if seconds_left() <= 0:
        pytest.skip(f"no time left for {item.name}")


@pytest.fixture
def at_most(request):
    """at_most(seconds) is a process's timeout; where the limit of `make gpu` ends it sooner, its test is skipped."""

    @contextlib.contextmanager
    def watch(seconds: float):
        left = max(seconds_left(), 0.0)
        try:
            yield min(seconds, left)
        except subprocess.TimeoutExpired:
            if left >= seconds:
                raise
            pytest.skip(f"no time left: the process of {request.node.name} had not ended")

    return watch

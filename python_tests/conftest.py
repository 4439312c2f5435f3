"""What every test shares: one thread, fixed seeds, and a closing list of what was skipped and why."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    """Tiny tensors on a busy machine run many times slower on two threads; seeds make every failure repeat."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    has_cuda = torch.cuda.is_available()
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker("integration")
        if item.get_closest_marker("cuda") and not has_cuda:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def pytest_terminal_summary(terminalreporter):
    skipped: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped[reason] = skipped.get(reason, 0) + 1
    if skipped:
        terminalreporter.section("not shown on this machine")
        for reason, count in sorted(skipped.items()):
            terminalreporter.line(f"{count} x {reason}")

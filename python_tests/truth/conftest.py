"""Prints, after the tests, the worst error of every dtype and quantity that was compared with the oracle."""

import pytest

import tolerances


@pytest.fixture(autouse=True)
def _keep_worst_errors(request):
    """Reports carry the errors, so that the table also holds what other worker processes compared."""
    tolerances.WORST.clear()
    yield
    request.node.user_properties.append(("worst_errors", tolerances.recorded()))


def pytest_terminal_summary(terminalreporter):
    tolerances.WORST.clear()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, rows in getattr(report, "user_properties", ()):
                if name == "worst_errors":
                    tolerances.absorb(rows)
    if tolerances.WORST:
        terminalreporter.section("worst errors against the float64 oracle")
        for line in tolerances.table():
            terminalreporter.line(line)

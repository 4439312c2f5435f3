"""`opd-engine check`: green on this machine, red under a planted error, and its failures are told."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.ranks]


def check(*arguments, timeout=180):
    command = [sys.executable, "-m", "opd_engine", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_cell_holds_and_every_control_is_seen(tp_size):
    done = check("--tp", str(tp_size), "--json", "--seed", str(tp_size))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] and found["complete"] and found["tp"] == tp_size
    assert len(found["cells"]) == 4 * (3 * 3 * 5 + 5)
    assert {cell["dtype"] for cell in found["cells"]} == {"float64", "float32", "bfloat16", "float16"}
    assert all(control["seen"] for control in found["controls"])
    names = {control["name"] for control in found["controls"]}
    assert {"loss / tp", "1% gradient error", "off-by-one row"} <= names
    assert ("loss on rank 0 only" in names) == (tp_size > 1)


@pytest.mark.parametrize("plant", ["1% gradient error", "1% value error", "loss on rank 0 only"])
def test_a_planted_error_turns_the_table_red(plant):
    done = check("--tp", "2", "--dtype", "bfloat16", "--plant", plant)
    assert done.returncode == 1
    assert "FAIL" in done.stdout and "FAIL bfloat16 student bucket reverse_kl" in done.stdout
    assert "PASS" not in done.stdout


def test_the_table_names_rows_columns_and_controls():
    done = check("--dtype", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("forward_kl", "skew_reverse_kl", "renormalize", "mixed", "(full)", "planted errors", "PASS: 50 cells"):
        assert word in done.stdout
    assert "float64" not in done.stdout.splitlines()[4] and done.stderr == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tp", "0"], "--tp: wanted at least 1 process, got 0"),
        (["--timeout", "0"], "--timeout: wanted more than 0 seconds, got 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--plant", "moss"], "--plant: wanted one of"),
    ],
)
def test_wrong_usage(arguments, message):
    done = check(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_a_timeout_ends_every_process_and_says_so():
    done = check("--tp", "2", "--timeout", "0.2")
    assert done.returncode == 1 and "not done after 0.2 s" in done.stderr


def test_a_failing_rank_brings_its_message(monkeypatch):
    """An interface that gloo cannot find: the first rank's own words reach the user."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    done = check("--tp", "2", "--dtype", "float32", "--timeout", "60")
    assert done.returncode == 1
    assert "of 2 failed with status" in done.stderr and "no-such-interface" in done.stderr


def test_help_says_what_the_figures_mean():
    done = check("--help")
    assert done.returncode == 0
    for word in ("--tp", "--dtype", "--device", "--seed", "--json", "share of what is allowed", "Exit status"):
        assert word in " ".join(done.stdout.split())
    assert "--plant" not in done.stdout


def test_the_reference_shares_nothing_with_the_engine():
    source = (ROOT / "opd_engine" / "check" / "reference.py").read_text()
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    assert modules == {"__future__", "math", "torch"}

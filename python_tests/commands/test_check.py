"""`opd-engine check`: all that is exported is in it, it is green on this machine and red under a fault anywhere."""

import ast
import contextlib
import dataclasses
import inspect
import json
import subprocess
import sys

import pytest
import torch

import check_faults
import opd_engine
from opd_engine.check import cells as check_cells
from opd_engine.check.cells import Judged, run_cells
from opd_engine.check.inputs import Inputs
from opd_engine.check.reference import DIVERGENCES, TAIL_MODES
from opd_engine.check.score_cells import FIELDS, SUPPORTS
from opd_engine.check.sources import SOFTCAP
from opd_engine.check.table import list_cells
from opd_engine.parallel.launch import World
from ranks import ROOT, run_ranks

DTYPES = ("float64", "float32", "bfloat16", "float16")
ALONE = World(0, 1, 0, torch.device("cpu"))
CELLS = list_cells(False)


def check(*arguments, timeout=240, environment=None):
    command = [sys.executable, "-m", "opd_engine", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout, env=environment)


def judged(cells, dtype, world=ALONE, seed=0):
    found = run_cells(cells, Inputs(getattr(torch, dtype), world, seed), dtype)
    return [one for one in found if isinstance(one, Judged)]


# ---- what is exported is checked ----

# It computes nothing, and takes a process group and the import of torch.distributed.tensor: its own tests have both.
WITHOUT_A_CELL = {"local_logits"}


def exported_functions():
    return {name: value for name in opd_engine.__all__ if callable(value := getattr(opd_engine, name))}


def exported_ops():
    prefix = "opd_engine::"
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}


@contextlib.contextmanager
def recorded(monkeypatch):
    """What the cells call and get back, by name; and the options of each function that were away from their default."""
    called, given = set(), {}
    with monkeypatch.context() as patch:
        for name in exported_ops():
            original = getattr(torch.ops.opd_engine, name)

            def op(*arguments, name=name, original=original):
                called.add(name)
                return original(*arguments)

            patch.setattr(torch.ops.opd_engine, name, op, raising=False)
        for name, original in exported_functions().items():
            parameters = inspect.signature(original).parameters

            def function(*arguments, name=name, original=original, parameters=parameters, **options):
                called.add(name)
                named = {**dict(zip(parameters, arguments)), **options}
                given.setdefault(name, set()).update(
                    key
                    for key, value in named.items()
                    if isinstance(value, torch.Tensor) or value is not parameters[key].default
                )
                result = original(*arguments, **options)
                called.add(type(result).__name__)
                return result

            patch.setattr(opd_engine, name, function)
        yield called, given


def not_checked(monkeypatch):
    """(exports, ops, "function(parameter)") that no cell of the default table calls or gives."""
    functions, ops = exported_functions(), exported_ops()
    with recorded(monkeypatch) as (called, given):
        judged(CELLS, "float32")
    parameters = {
        f"{name}({key})"
        for name, value in functions.items()
        if inspect.isfunction(value) and name not in WITHOUT_A_CELL
        for key in inspect.signature(value).parameters
        if key not in given.get(name, ())
    }
    return set(functions) - called - WITHOUT_A_CELL, ops - called, parameters


def test_everything_exported_is_in_a_cell(monkeypatch):
    exports, ops, parameters = not_checked(monkeypatch)
    assert not exports and not ops, "give what is exported a cell in opd_engine/check/, listed in table.py"
    assert not parameters, "give each parameter a cell that needs it"
    assert len(exported_ops()) == 13 and {"gather_log_probs", "mix_teachers"} <= set(exported_functions())


def test_an_export_without_a_cell_is_named(monkeypatch):
    monkeypatch.setattr(opd_engine, "new_loss", lambda logits: logits, raising=False)
    monkeypatch.setattr(opd_engine, "__all__", [*opd_engine.__all__, "new_loss"])
    exports, _, parameters = not_checked(monkeypatch)
    assert exports == {"new_loss"} and "new_loss(logits)" in parameters


def test_every_field_and_setting_is_judged():
    assert {"indices", *FIELDS} == {field.name for field in dataclasses.fields(opd_engine.TokenScores)}
    assert opd_engine.LinearLoss._fields == ("loss", "token_losses")
    assert DIVERGENCES == opd_engine.ops.DIVERGENCES and TAIL_MODES == opd_engine.ops.TAIL_MODES
    for full in (False, True):
        for function in ("distill_loss", "linear_distill_loss"):
            of = [one for one in list_cells(full) if one.function == function and one.divergence != "user"]
            assert {(one.divergence, one.tail) for one in of} == {(a, b) for a in DIVERGENCES for b in TAIL_MODES}
            assert {one.support for one in of} == set(SUPPORTS)
    names = [(cell.function, cell.line, cell.setting) for cell in list_cells(True)]
    assert len(set(names)) == len(names) and {cell.name for cell in CELLS} <= {cell.name for cell in list_cells(True)}


# ---- faults are seen ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_fault_is_seen_by_every_function_it_touches(dtype, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(check_cells, "plants", lambda *_: ())
    monkeypatch.setattr(check_cells, "_that_matter", lambda *_: [])
    unseen = {}
    for name, fault in check_faults.FAULTS.items():
        if fault.ranks > 1:
            continue
        cells = [cell for cell in CELLS if cell.function in fault.functions]
        with check_faults.planted(name):
            red = [one for one in judged(cells, dtype) if not one.passed]
        if missing := set(fault.functions) - {one.function for one in red}:
            unseen[name] = missing
        assert all(one.where for one in red)
    assert not unseen
    assert all(one.passed for one in judged(CELLS, dtype)), "a fault outlived its block"


def faults_on_two_ranks(seed):
    """Each fault that needs ranks, at every dtype: the functions that did not see it, judged by any rank."""
    torch.set_num_threads(1)
    check_cells.plants, check_cells._that_matter = lambda *_: (), lambda *_: []
    red = {}
    world = World(torch.distributed.get_rank(), 2, 0, torch.device("cpu"), torch.distributed.group.WORLD)
    for name, fault in check_faults.FAULTS.items():
        if fault.ranks < 2:
            continue
        cells = [cell for cell in CELLS if cell.function in fault.functions]
        for dtype in DTYPES:
            with check_faults.planted(name):
                found = judged(cells, dtype, world, seed)
            red[f"{name}, {dtype}"] = sorted({one.function for one in found if not one.passed})
    return red


@pytest.mark.ranks
def test_faults_between_ranks_are_seen():
    first, second = run_ranks(__file__, "faults_on_two_ranks", 2, seed=3)
    for name, fault in check_faults.FAULTS.items():
        for dtype in DTYPES if fault.ranks > 1 else ():
            seen = {*first[f"{name}, {dtype}"], *second[f"{name}, {dtype}"]}
            assert set(fault.functions) <= seen, (name, dtype)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name, tp_size, failing",
    [
        ("1% in the gradient of distill_loss_", 2, "FAIL bfloat16 torch.ops.opd_engine: distill_loss_: "),
        ("the floor dropped in distill_loss_", 1, "FAIL bfloat16 linear_distill_loss: floor: "),
        ("entropy of the wrong sign", 2, "FAIL bfloat16 gather_log_probs: entropy: "),
    ],
)
def test_a_fault_in_the_engine_turns_the_command_red(name, tp_size, failing, tmp_path):
    environment = check_faults.plant_in_commands(name, tmp_path)
    done = check("--tp", str(tp_size), "--dtype", "bfloat16", environment=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if failing in line)
    assert "error " in line and "allowed " in line and "got " in line and "wanted " in line
    assert "PASS" not in done.stdout


# ---- the command ----


@pytest.mark.slow
def test_the_cuda_kernels_hold_in_the_emulator(tmp_path):
    """The same table over the `.cuh` files that nvcc compiles."""
    (tmp_path / "sitecustomize.py").write_text(
        "import types, opd_engine, emulated\nopd_engine.VocabShard  # loads the ops\n"
        "kept = types.SimpleNamespace()\nemulated.pytest_configure(kept)\n"
    )
    refused = check("--dtype", "float64", environment=check_faults.environment_with(tmp_path))
    assert refused.returncode == 1 and "float64 runs on the CPU only" in refused.stdout, (
        "these are not the CUDA kernels"
    )
    done = check("--dtype", "bfloat16", environment=check_faults.environment_with(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert f"PASS: {len(CELLS)} cells" in done.stdout


@pytest.mark.ranks
@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_cell_holds_and_every_control_is_seen(tp_size):
    done = check("--tp", str(tp_size), "--json", "--seed", str(tp_size))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] and found["complete"] and found["tp"] == tp_size
    assert len(found["cells"]) == 4 * len(CELLS)
    assert {cell["dtype"] for cell in found["cells"]} == set(DTYPES)
    assert all(control["seen"] for control in found["controls"])
    names = {control["name"] for control in found["controls"]}
    assert {"loss / tp", "1% gradient error", "1% value error", "off-by-one row"} <= names
    assert {"teacher_log_prob_min ignored", "target ignored", "loss_rows ignored", "mode ignored"} <= names
    assert ("loss on rank 0 only" in names) == (tp_size > 1) == ("loss_reduction ignored" in names)


@pytest.mark.ranks
def test_the_full_table_holds_on_three_ranks():
    done = check("--full", "--tp", "3", "--dtype", "float32", "--json", "--seed", "5")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    found = json.loads(done.stdout)
    assert found["full"] and len(found["cells"]) == len(list_cells(True)) > 3 * len(CELLS)


@pytest.mark.ranks
def test_the_table_names_functions_lines_and_controls():
    done = check("--dtype", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (
        "linear_distill_loss",
        "row temperatures",
        "renormalize",
        "planted errors",
        f"PASS: {len(CELLS)} cells",
    ):
        assert word in done.stdout
    assert "float64" not in done.stdout.splitlines()[3] and done.stderr == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tp", "0"], "--tp: wanted at least 1 process, got 0"),
        (["--timeout", "0"], "--timeout: wanted more than 0 seconds, got 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_usage(arguments, message):
    done = check(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_a_gpu_is_asked_for_what_it_computes(monkeypatch, capsys):
    from opd_engine.check import command

    monkeypatch.setattr("opd_engine.ops.build_info", lambda: {"cuda": "12.8"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert command.parse(["--device", "cuda"]).dtype == ("float32", "bfloat16", "float16")
    with pytest.raises(SystemExit, match="2"):
        command.parse(["--device", "cuda", "--dtype", "float64"])
    assert "--dtype: float64 runs on the CPU only" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command.parse(["--device", "cuda", "--tp", "2"])
    assert "--device: wanted 2 GPUs, one a process, found 1" in capsys.readouterr().err


@pytest.mark.ranks
def test_a_timeout_ends_every_process_and_says_so():
    done = check("--tp", "2", "--timeout", "0.2")
    assert done.returncode == 1 and "not done after 0.2 s" in done.stderr


@pytest.mark.ranks
def test_a_failing_rank_brings_its_message(monkeypatch):
    """An interface that gloo cannot find: the first rank's own words reach the user."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    done = check("--tp", "2", "--dtype", "float32", "--timeout", "60")
    assert done.returncode == 1
    assert "of 2 failed with status" in done.stderr and "no-such-interface" in done.stderr


def test_help_says_what_the_figures_mean():
    done = check("--help")
    assert done.returncode == 0
    for word in (
        "--tp",
        "--dtype",
        "--device",
        "--seed",
        "--full",
        "--json",
        "share of what is allowed",
        "Exit status",
    ):
        assert word in " ".join(done.stdout.split())


# ---- the reference ----


def test_the_reference_shares_nothing_with_the_engine():
    source = (ROOT / "opd_engine" / "check" / "reference.py").read_text()
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    assert modules == {"__future__", "math", "torch"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_capped_logit_of_the_grid_lies_between_two_halves(dtype):
    """Else the engine's float32 and the reference's float64 could round it to different neighbours."""
    logits = torch.arange(-280, 281, dtype=torch.float64) / 8
    capped = SOFTCAP * torch.tanh(logits / SOFTCAP)
    for nudge in (1 - 1e-6, 1 + 1e-6):
        torch.testing.assert_close((capped * nudge).to(dtype), capped.to(dtype), rtol=0, atol=0)


def test_inputs_are_the_same_numbers_in_every_dtype():
    exact, half = (Inputs(dtype, ALONE, 0) for dtype in (torch.float64, torch.bfloat16))
    for name in ("student", "teacher", "hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias"):
        torch.testing.assert_close(getattr(half, name).double(), getattr(exact, name), rtol=0, atol=0)
    logits = exact.hidden @ exact.weight[:1031].T + exact.bias[:1031]
    torch.testing.assert_close(logits.to(torch.bfloat16).double(), logits, rtol=0, atol=0)

"""Run one function in N real processes that talk over loopback; one launch is meant to serve many checks.

A worker is a plain function in any module or file: it reads RANK and WORLD_SIZE from the environment as under torchrun,
and returns something JSON can hold. If a rank fails or the time is up, all are ended and the failing rank's output
is in the error. Imports take most of the time (about two seconds a process), so put many checks behind one launch.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


class RanksFailed(AssertionError):
    """A rank failed or time ran out; `outputs[rank]` is what each wrote."""

    def __init__(self, message: str, outputs: list[str]):
        super().__init__(message)
        self.outputs = outputs


def free_port() -> int:
    """A port of the loopback that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def python_environment(*folders: str | Path, **variables: object) -> dict[str, str]:
    """The environment of a process that a test starts: one thread, loopback, and the way to the tests and the package.

    folders: looked through before them
    """
    searched = [*folders, TESTS, TESTS / "support", ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(map(str, searched)),
        **{name: str(value) for name, value in variables.items()},
    }


def rank_environment(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    """Torchrun's variables, but for the port: the ranks meet at a file, so none is taken."""
    return python_environment(
        RANK=rank,
        LOCAL_RANK=rank,
        WORLD_SIZE=world_size,
        LOCAL_WORLD_SIZE=world_size,
        OPD_TEST_STORE=folder / "store",
    )


def run_ranks(
    module_or_file: str | Path, function: str, world_size: int, timeout: float = 120.0, **json_args: Any
) -> list[Any]:
    """Call `function(**json_args)` in `world_size` processes with gloo initialised; returns each rank's result.

    module_or_file: a dotted module importable from python_tests, its support or the project, or a path to a Python file
        (a test module may pass its own `__file__`).
    Raises RanksFailed when a rank exits non-zero or `timeout` seconds pass; the other ranks are ended first.
    """
    with tempfile.TemporaryDirectory(prefix="opd-ranks-") as name:
        folder = Path(name)
        job = {"target": str(module_or_file), "function": function, "args": json_args, "timeout": timeout}
        (folder / "job.json").write_text(json.dumps(job))
        ranks = [_start(rank, world_size, folder) for rank in range(world_size)]
        try:
            problem = _wait(ranks, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                _end(rank)
        outputs = [(folder / f"{rank}.log").read_text(errors="replace") for rank in range(world_size)]
        if problem is not None:
            blamed, reason = problem
            shown = "\n".join(f"--- rank {rank} ---\n{outputs[rank][-6000:]}" for rank in blamed)
            raise RanksFailed(f"{function} on {world_size} ranks: {reason} (limit {timeout:g} s)\n{shown}", outputs)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


_LAUNCHED: dict[tuple, list[Any] | RanksFailed] = {}


def run_ranks_once(module: str, function: str, world_size: int, timeout: float = 240.0, **json_args: Any) -> list[Any]:
    """`run_ranks` for many tests that look at one launch: the same call launches once, also where it fails."""
    call = (module, function, world_size, *sorted(json_args.items()))
    if call not in _LAUNCHED:
        try:
            _LAUNCHED[call] = run_ranks(module, function, world_size, timeout, **json_args)
        except RanksFailed as problem:
            _LAUNCHED[call] = problem
    if isinstance(found := _LAUNCHED[call], RanksFailed):
        raise found
    return found


def _start(rank: int, world_size: int, folder: Path) -> subprocess.Popen:
    with open(folder / f"{rank}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=rank_environment(rank, world_size, folder),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(ranks: list[subprocess.Popen], deadline: float) -> tuple[list[int], str] | None:
    """None when all ended well, else the ranks to show and why."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            time.sleep(0.3)  # a rank may have died of its neighbour's death: show every one that ended badly
            codes = [rank.poll() for rank in ranks]
            failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
            return failed, f"rank {failed[0]} exited with {codes[failed[0]]}"
        running = [rank for rank, code in enumerate(codes) if code is None]
        if not running:
            return None
        if time.monotonic() > deadline:
            return running, f"ranks {running} did not finish"
        time.sleep(0.02)


def _end(rank: subprocess.Popen) -> None:
    """End the rank's whole session, so that nothing it started outlives the test."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()


def _load(target: str):
    if not target.endswith(".py"):
        return importlib.import_module(target)
    path = Path(target).resolve()
    if path.is_relative_to(TESTS):  # under its dotted name, so that its own imports of siblings resolve once
        return importlib.import_module(".".join(path.relative_to(TESTS).with_suffix("").parts))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _worker(folder: Path) -> None:
    import datetime
    import faulthandler

    import torch
    import torch.distributed as dist

    faulthandler.enable()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    job = json.loads((folder / "job.json").read_text())
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ["OPD_TEST_STORE"], world_size)
    limit = datetime.timedelta(seconds=job["timeout"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    result = getattr(_load(job["target"]), job["function"])(**job["args"])
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A cycle may keep the group and with it gloo's threads; one that frees a tensor while Python shuts down aborts.
    os._exit(0)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))

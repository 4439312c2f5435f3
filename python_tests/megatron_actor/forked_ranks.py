"""Ranks of `opd-engine train` for tests that start it many times: forked from a process that has imported everything.

A start costs a fork instead of seconds of imports; what runs is the command line of examples/megatron/train.py. Each
rank is a session of its own, so that a test may kill the rank alone or with all that it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "megatron"


class Ranks:
    """The ranks of one start, seen from the test's process."""

    def __init__(self, nursery: Nursery, processes: list[int], log: Path) -> None:
        self._nursery, self.processes, self._log = nursery, processes, log

    def kill(self, *ranks: int) -> None:
        """SIGKILL, to the ranks alone: what they have started lives on."""
        for rank in ranks:
            os.kill(self.processes[rank], signal.SIGKILL)

    def running(self) -> bool:
        return None in self._nursery.ask("codes", processes=self.processes)

    def wait(self, timeout_s: float = 120.0) -> list[int]:
        """The exit codes."""
        deadline = time.monotonic() + timeout_s
        while None in (codes := self._nursery.ask("codes", processes=self.processes)):
            assert time.monotonic() < deadline, f"ranks {self.processes} are still running: {self.said()}"
            time.sleep(0.05)
        return codes

    def end(self) -> None:
        """End what the ranks have left behind, too."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process, signal.SIGKILL)

    def said(self) -> str:
        return self._log.read_text(errors="replace")[-6000:]


class Nursery:
    """The process that ranks are forked from; end it with close()."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._starts = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
        environment.pop("RANK", None)
        with open(folder / "nursery.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env=environment,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout.readline() == "ready\n", (folder / "nursery.log").read_text()

    def start(self, ranks: int, port: int, *arguments: str, file_limit: int | None = None) -> Ranks:
        """The command's ranks. file_limit: bytes that rank 0 and its writers may write to a file, as on a full disk."""
        self._starts += 1
        log = self._folder / f"ranks-{self._starts}.log"
        job = {"ranks": ranks, "port": port, "arguments": arguments, "log": str(log), "file_limit": file_limit}
        return Ranks(self, self.ask("start", **job), log)

    def ask(self, what: str, **values):
        self._process.stdin.write(json.dumps({"what": what, **values}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _fork(rank: int, job: dict) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": job["port"]}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in values.items()}})
        if rank == 0 and job["file_limit"]:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from opd_engine.cli import main

        code = main(["train", *job["arguments"], "--run.backend", "megatron"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        from multiprocessing.util import _exit_function

        _exit_function()  # as at the end of every Python process: children that still write are waited for
        sys.stdout.flush()
        os._exit(code)


def _serve() -> None:
    sys.path.insert(0, str(EXAMPLE))
    import on_cpu

    on_cpu.install()
    import transformers  # noqa: F401  (imported here, forked from here)
    from megatron.core.dist_checkpointing.strategies import torch as _  # noqa: F401

    import opd_engine.train.backends.megatron
    import opd_engine.train.loop  # noqa: F401

    print("ready", flush=True)
    codes: dict[int, int] = {}
    for line in sys.stdin:
        job = json.loads(line)
        if job["what"] == "start":
            answer = [_fork(rank, job) for rank in range(job["ranks"])]
        else:
            answer = []
            for process in job["processes"]:
                if process not in codes:
                    ended, status = os.waitpid(process, os.WNOHANG)
                    if ended:
                        codes[process] = os.waitstatus_to_exitcode(status)
                answer.append(codes.get(process))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()

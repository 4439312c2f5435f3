"""Arguments of `opd-engine check`, its processes (loopback, bounded in time, ended as groups) and its exit status."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from opd_engine.check.report import Progress, render, summarise

DTYPE_NAMES = ("float64", "float32", "bfloat16", "float16")


class RankFailed(RuntimeError):
    """A rank ended badly or time ran out; the message holds what it wrote."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="opd-engine check",
        description="Compare what the package exports (scores, losses, mixtures, from logits and from hidden states, "
        "and the ops) with a float64 reference on this machine: value and gradient, in N real processes that share the "
        "vocabulary. Planted errors are run too and must be seen.",
        epilog="Each figure is the error as a share of what is allowed: twice the error that the same formula has in "
        "plain torch at that dtype, plus a small floor. Exit status: 0 all hold, 1 something does not, 2 wrong usage. "
        "Examples: opd-engine check; opd-engine check --tp 4 --dtype bfloat16 --full; "
        "opd-engine check --json > table.json",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="every combination of divergence, tail mode, support, head and layout; without it they take turns",
    )
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="processes that share the vocabulary, unevenly (default: 1)"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=DTYPE_NAMES,
        help="logits' dtype; repeat for several (default: all that the device computes; cuda has no float64)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda needs one GPU a process (default: cpu)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the rows and of where the shards begin (default: 0)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="end all after this many seconds (default: 300)",
    )
    parser.add_argument("--json", action="store_true", help="print the cells as JSON instead of the table")
    options = parser.parse_args(argv)
    if options.tp < 1:
        parser.error(f"--tp: wanted at least 1 process, got {options.tp}")
    if not options.timeout > 0:
        parser.error(f"--timeout: wanted more than 0 seconds, got {options.timeout:g}")
    if options.device == "cuda":
        _check_cuda(parser, options)
    if options.dtype is None:
        options.dtype = DTYPE_NAMES[1:] if options.device == "cuda" else DTYPE_NAMES
    return options


def _check_cuda(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    import torch

    from opd_engine.ops import build_info

    if not build_info()["cuda"]:
        parser.error("--device: this build of opd_engine has no CUDA kernels; wanted cpu, got cuda")
    if torch.cuda.device_count() < options.tp:
        parser.error(f"--device: wanted {options.tp} GPUs, one a process, found {torch.cuda.device_count()}")
    if "float64" in (options.dtype or ()):
        parser.error("--dtype: float64 runs on the CPU only; wanted float32, bfloat16 or float16 on cuda, got float64")


def run_command(argv: Sequence[str] | None) -> int:
    options = parse(argv)
    dtypes = [name for name in DTYPE_NAMES if name in options.dtype]
    started = time.monotonic()
    try:
        items = run_ranks(options, dtypes)
    except RankFailed as failure:
        print(f"opd-engine check: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("opd-engine check: interrupted; every process was ended", file=sys.stderr)
        return 130
    summary = summarise(items, options, dtypes, time.monotonic() - started)
    print(json.dumps(summary, indent=1) if options.json else render(summary))
    return 0 if summary["passed"] else 1


def run_ranks(options: argparse.Namespace, dtypes: list[str]) -> list[dict]:
    """What all ranks wrote: every cell and control, and where each rank was done."""
    with tempfile.TemporaryDirectory(prefix="opd-check-") as name:
        folder = Path(name)
        results = folder / "results.jsonl"
        results.touch()
        job = {
            "results": str(results),
            "dtypes": dtypes,
            "full": options.full,
            "device": options.device,
            "seed": options.seed,
            "timeout_s": options.timeout,
        }
        (folder / "job.json").write_text(json.dumps(job))
        port = _free_port()
        ranks = []
        try:
            for rank in range(options.tp):
                ranks.append(_start(rank, options.tp, port, folder))
            _wait(ranks, results, options, folder)
        finally:
            for process in ranks:
                _end(process)
        return [json.loads(line) for line in results.read_text().splitlines()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(rank: int, world_size: int, port: int, folder: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # a check started under torchrun is a world of its own
    with open(folder / f"{rank}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "opd_engine.check.worker", str(folder / "job.json")],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(ranks: list[subprocess.Popen], results: Path, options: argparse.Namespace, folder: Path) -> None:
    deadline = time.monotonic() + options.timeout
    with Progress() as progress:
        while any(process.poll() is None for process in ranks):
            progress.show(results.read_bytes().count(b"\n"))
            late = time.monotonic() > deadline
            if late or any(process.poll() not in (None, 0) for process in ranks):
                break
            time.sleep(0.05)
        else:
            late = False
    codes = [process.poll() for process in ranks]
    if late:
        raise RankFailed(f"not done after {options.timeout:g} s (--timeout); processes still running were ended")
    failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
    if failed:
        written = (folder / f"{failed[0]}.log").read_text(errors="replace").strip()
        raise RankFailed(f"rank {failed[0]} of {len(ranks)} failed with status {codes[failed[0]]}:\n{written[-4000:]}")


def _end(process: subprocess.Popen) -> None:
    """End the rank, if it runs, with whatever it started."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

"""Joining the ranks that torchrun (or any launcher with its environment) started, and leaving them together.

A rank that fails posts its error in the store; every other rank prints that error and ends non-zero within seconds,
also one that is stuck in a collective. A rank that dies without a word is found by its missing heartbeat.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_POLL_S = 0.2
# How long a rank that was told of another's failure may unwind (close files, end threads) before it is ended.
_GRACE_S = 5.0
# A rank that has not beaten for this long, while another's connection to it broke, is gone.
_SILENT_S = 2.0
# How gloo and NCCL say that the other end is gone; neither says which rank that was.
_LOST = ("by peer", "broken pipe", "remote process exited", "connection was closed")


@dataclass(frozen=True)
class World:
    """All ranks of this run. rank and world_size count processes; group is None when this process is alone."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    group: ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def read_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """(rank, world_size, local_rank) as torchrun sets them; (0, 1, 0) where no launcher has set any.

    Raises: ValueError naming the variable that is missing, not a number or out of range.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return 0, 1, 0
    values = {}
    for name, default in (("RANK", None), ("WORLD_SIZE", None), ("LOCAL_RANK", environment.get("RANK"))):
        text = environment.get(name, default)
        if text is None:
            raise ValueError(f"{name}: wanted a number in the environment, as torchrun sets it, got none")
        if not text.isdecimal():
            raise ValueError(f"{name}: wanted a number in the environment, got {text!r}")
        values[name] = int(text)
    rank, world_size = values["RANK"], values["WORLD_SIZE"]
    if world_size < 1 or rank >= world_size:
        raise ValueError(f"RANK: wanted 0 <= RANK < WORLD_SIZE, got RANK={rank}, WORLD_SIZE={world_size}")
    if world_size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise ValueError(f"{name}: wanted it in the environment for WORLD_SIZE={world_size}, got none")
        if not environment["MASTER_PORT"].isdecimal():
            raise ValueError(f"MASTER_PORT: wanted a number in the environment, got {environment['MASTER_PORT']!r}")
    return rank, world_size, values["LOCAL_RANK"]


@contextlib.contextmanager
def join_world(device: str = "cpu", *, timeout_s: float = 600.0, group_when_alone: bool = False) -> Iterator[World]:
    """Be one of the ranks for the length of the block; alone, do nothing.

    device: "cpu" (gloo) or "cuda" (NCCL, and gloo for CPU tensors; the device is that of LOCAL_RANK)
    timeout_s: > 0, the longest that a collective, a missing rank or a silent rank is waited for
    group_when_alone: set up a process group of one rank too, for frameworks that ask every group for its size
    Raises: ValueError for a launcher's environment that is incomplete, an unknown device or a timeout <= 0;
        RuntimeError that carries another rank's message when that rank failed first. Where the block cannot be left
        (a collective that will never complete), the process prints the message and exits with status 1 instead.
    Communicates: sets up the default process group; leaving waits for every rank to leave.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: wanted 'cpu' or 'cuda', got {device!r}")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s: wanted > 0 seconds, got {timeout_s!r}")
    rank, world_size, local_rank = read_environment()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: wanted a CUDA device that torch can use, got none; use 'cpu'")
    local_device = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(local_device)
    if world_size == 1:
        if group_when_alone:
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield World(0, 1, local_rank, local_device)
        finally:
            if group_when_alone:
                dist.destroy_process_group()
        return

    timeout = timedelta(seconds=timeout_s)
    store, watch_store = _open_stores(rank, timeout)
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    watcher = _Watcher(watch_store, rank, world_size, timeout_s)
    watcher.start()
    exit_request: SystemExit | None = None
    clean = False
    try:
        try:
            yield World(rank, world_size, local_rank, local_device, dist.group.WORLD)
        except SystemExit as request:
            if request.code not in (None, 0):
                raise
            exit_request = request
        watcher.leave_together()
        clean = True
    except BaseException as error:
        text, gone = f"{type(error).__name__}: {error}", None
        if any(words in str(error).lower() for words in _LOST):
            gone = watcher.silent_rank()
        if gone is not None:
            text = f"it ended without a word; rank {rank} lost its connection: {text}"
        first = watcher.post_failure(text, gone)
        if first is None and gone is not None:
            first = f"rank {gone} failed: {text}"
        if first is not None:
            raise RuntimeError(first) from error
        raise
    finally:
        watcher.stop()
        # After a failure NCCL waits for peers that are gone; gloo does not. The process is about to end either way.
        if clean or device == "cpu":
            dist.destroy_process_group()
    if exit_request is not None:
        raise exit_request


def _open_stores(rank: int, timeout: timedelta) -> tuple[dist.Store, dist.Store]:
    """One connection for the process group and one for the watcher: a blocking get would hold a shared one's lock."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun hosts the store in its own process and says so; else rank 0 hosts it.
    hosted = _launcher_hosts_store()
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    first = dist.TCPStore(host, port, is_master=rank == 0 and not hosted, timeout=timeout, wait_for_workers=False)
    second = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"opd_engine/{restart}/group", first), dist.PrefixStore(
        f"opd_engine/{restart}/watch", second
    )


def _launcher_hosts_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class _Watcher(threading.Thread):
    """Beats, listens to the next rank's heart, and ends this process when another rank has failed."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
        super().__init__(name="opd_engine-watcher", daemon=True)
        self._store = store
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._neighbour = (rank + 1) % world_size
        self._timeout_s = timeout_s
        self._left = threading.Event()
        self._unwinding = threading.Event()
        self._failure: str | None = None

    def run(self) -> None:
        beats, changed_at = -1, time.monotonic()
        while not self._left.wait(_POLL_S):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                failure = self._read_failure()
                heard = self._store.add(f"beat/{self._neighbour}", 0)
                if heard != beats:
                    beats, changed_at = heard, time.monotonic()
                elif failure is None and time.monotonic() - changed_at > self._timeout_s:
                    text = f"no sign of life for {self._timeout_s:g} s"
                    failure = self._post(self._neighbour, text) or f"rank {self._neighbour} failed: {text}"
            except RuntimeError as error:  # the process that hosted the store has ended
                host = "the launcher" if _launcher_hosts_store() else "rank 0"
                failure = f"{host}, which hosts the store, cannot be reached any more ({error})"
            if failure is not None and not self._left.is_set():
                self._end(failure)
                return

    def silent_rank(self) -> int | None:
        """The rank that has stopped beating; None where all beat, or where one has said why it failed."""
        self._unwinding.set()
        try:
            beats = {other: self._store.add(f"beat/{other}", 0) for other in self._others}
            deadline = time.monotonic() + min(_SILENT_S, self._timeout_s)
            while time.monotonic() < deadline:
                if self._failure is not None or self._store.check(["failure"]):
                    return None
                time.sleep(_POLL_S / 4)
            silent = [other for other, count in beats.items() if self._store.add(f"beat/{other}", 0) == count]
        except RuntimeError:  # the store is gone; where a rank hosts it, it is rank 0 that does
            return None if _launcher_hosts_store() or self._rank == 0 else 0
        return silent[0] if silent else None

    def post_failure(self, text: str, culprit: int | None = None) -> str | None:
        """Tell the others, and wait until they have heard. Returns another rank's failure where that came first.

        culprit: the rank that failed; default this one
        """
        self._unwinding.set()
        if self._failure is not None:
            return self._failure
        try:
            if (first := self._post(self._rank if culprit is None else culprit, text)) is not None:
                return first
            # Whoever hosts the store, or is about to be cleaned up by its launcher, must not go before they have.
            deadline = time.monotonic() + min(_GRACE_S, self._timeout_s)
            waiting = [other for other in self._others if other != culprit]
            while waiting and time.monotonic() < deadline:
                time.sleep(_POLL_S / 4)
                waiting = [other for other in waiting if not self._store.check([f"heard/{other}"])]
        except RuntimeError:
            pass  # the store is gone and the others with it: nobody is left to be told
        return None

    def leave_together(self) -> None:
        """Wait until every rank has come here, or raise when one has failed."""
        self._store.set(f"done/{self._rank}", "")
        waiting = list(self._others)
        while waiting and self._failure is None:
            waiting = [other for other in waiting if not self._store.check([f"done/{other}"])]
            self._left.wait(_POLL_S / 4)
        if self._failure is not None:
            raise RuntimeError(self._failure)
        self.stop()
        left = self._store.add("left", 1)
        # Rank 0 may host the store: it goes last.
        deadline = time.monotonic() + _GRACE_S
        while self._rank == 0 and left <= len(self._others) and time.monotonic() < deadline:
            time.sleep(_POLL_S / 4)
            left = self._store.add("left", 0)

    def stop(self) -> None:
        """End the thread."""
        self._left.set()
        try:
            self.join(timeout=_GRACE_S)
        except KeyboardInterrupt:
            if self._failure is None:
                raise

    def _post(self, culprit: int, text: str) -> str | None:
        """Enter a failure unless one is there. Returns that of another rank where it was first."""
        self._store.compare_set("failure", "", json.dumps({"rank": culprit, "by": self._rank, "text": text}))
        return self._read_failure()

    def _read_failure(self) -> str | None:
        """What another rank has posted."""
        if not self._store.check(["failure"]):
            return None
        record = json.loads(self._store.get("failure"))
        return None if record["by"] == self._rank else f"rank {record['rank']} failed: {record['text']}"

    def _end(self, failure: str) -> None:
        self._failure = failure
        print(f"opd_engine: rank {self._rank} ends because {failure}", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"heard/{self._rank}", "")
        if not (self._left.is_set() or self._unwinding.is_set()):
            _thread.interrupt_main()
        if not self._left.wait(min(_GRACE_S, self._timeout_s)):
            # The main thread sits in a call that Python cannot interrupt, a collective most likely.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

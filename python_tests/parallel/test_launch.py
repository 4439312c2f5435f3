"""Ranks join, leave and fail together: nothing hangs, and every rank names the one that failed.

Each world is real processes with torchrun's environment, meeting at a loopback port.
"""

import os
import subprocess
import sys
import time

import pytest
import torch

from opd_engine.parallel.launch import World, join_world, read_environment
from opd_engine.parallel.meshes import split_world
from ranks import ROOT, free_port

RANK = """
import atexit, os, signal, sys, torch
from opd_engine.parallel.collectives import all_reduce_sum_
from opd_engine.parallel.launch import join_world

fault = sys.argv[1]
def said_last():
    assert not torch.distributed.is_initialized()
    print("left", world.rank, flush=True)


with join_world("cpu", timeout_s=float(sys.argv[2])) as world:
    total = all_reduce_sum_(torch.ones(1), world.group)
    assert total.item() == world.world_size
    print("joined", world.rank, world.is_main, flush=True)
    if world.rank == 1:
        if fault == "raises":
            raise ValueError("row 3 is sour")
        if fault == "exits":
            sys.exit(3)
        if fault == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
    if fault == f"killed {world.rank}":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault in ("raises", "stops") or fault.startswith("killed"):
        all_reduce_sum_(torch.ones(1), world.group)  # rank 1 never comes
    if fault == "exits":
        while True:  # busy, and not in a collective
            sum(range(1000))
    if world.rank == 1:
        atexit.register(said_last)
        sys.exit(0)  # also a way to leave
said_last()
"""


def run_world(fault, size, timeout_s=60.0, limit_s=60.0, ignore=()):
    """[(exit status, output)] by rank; ranks in `ignore` are ended without being waited for."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **address}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, fault, str(timeout_s)],
            env={**settings, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    deadline = time.monotonic() + limit_s
    ended = []
    try:
        for number, rank in enumerate(ranks):
            if number not in ignore:
                output, _ = rank.communicate(timeout=max(deadline - time.monotonic(), 0.1))
                ended.append((rank.returncode, output))
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return ended


def test_ranks_that_are_well_leave_with_0():
    for rank, (status, output) in enumerate(run_world("none", 2)):
        assert status == 0, output
        assert f"joined {rank} {rank == 0}" in output
        assert f"left {rank}" in output


def test_a_rank_that_raises_brings_the_others_down_with_its_message():
    """They sit in a collective that will never complete; its own timeout of 10 minutes does not matter."""
    ended = run_world("raises", 3, timeout_s=600.0)
    assert all(status not in (0, None) for status, _ in ended), ended
    for rank in (0, 2):
        assert f"rank {rank} ends because rank 1 failed: ValueError: row 3 is sour" in ended[rank][1]
    assert "ends because" not in ended[1][1]
    assert "ValueError: row 3 is sour" in ended[1][1]


def test_a_rank_that_exits_brings_down_one_that_is_busy():
    (status, output), (own_status, _) = run_world("exits", 2, timeout_s=600.0)
    assert status not in (0, None)
    assert own_status == 3
    assert "rank 0 ends because rank 1 failed: SystemExit: 3" in output


@pytest.mark.parametrize("killed", [1, 0])
def test_a_rank_that_is_killed_is_named_by_the_others(killed):
    """They see a connection break, which names no rank; rank 0 takes the store with it."""
    ended = run_world(f"killed {killed}", 3, timeout_s=600.0)
    assert ended[killed][0] == -9
    for rank in {0, 1, 2} - {killed}:
        status, output = ended[rank]
        assert status not in (0, None, -9)
        named = f"rank {killed} failed: it ended without a word; rank"
        assert named in output or (killed == 0 and "rank 0, which hosts the store," in output), output


def test_a_rank_that_falls_silent_is_found_within_the_timeout():
    ((status, output),) = run_world("stops", 2, timeout_s=3.0, ignore=(1,))
    assert status not in (0, None)
    # Its missing heartbeat or the collective's own timeout, whichever is seen first: both are 3 s.
    assert "rank 1 failed: no sign of life for 3 s" in output or "Timed out" in output


def test_alone_there_is_nothing_to_set_up(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with join_world() as world:
        assert world == World(0, 1, 0, torch.device("cpu"), None)
        assert not torch.distributed.is_initialized()
        assert split_world(world, 1) == (None, None)
    with pytest.raises(ZeroDivisionError), join_world():
        raise ZeroDivisionError  # nobody to tell


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: wanted a number in the environment, as torchrun sets it, got none"),
        ({"WORLD_SIZE": "2"}, "RANK: wanted a number"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK: wanted a number in the environment, got 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: wanted 0 <= RANK < WORLD_SIZE, got RANK=2, WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: wanted it in the environment for WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "b"}, "MASTER_PORT: wanted a number"),
    ],
)
def test_an_incomplete_environment_is_named(environment, message):
    with pytest.raises(ValueError, match=message):
        read_environment(environment)


def test_a_complete_environment_is_read():
    assert read_environment({}) == (0, 1, 0)
    assert read_environment({"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1, 0)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert read_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **address}) == (3, 4, 1)


@pytest.mark.parametrize(
    ("device", "timeout_s", "message"),
    [
        ("tpu", 1.0, "device: wanted 'cpu' or 'cuda', got 'tpu'"),
        ("cpu", 0.0, "timeout_s: wanted > 0 seconds, got 0.0"),
        ("cpu", float("nan"), "timeout_s: wanted > 0 seconds, got nan"),
    ],
)
def test_settings_that_cannot_be(device, timeout_s, message):
    with pytest.raises(ValueError, match=message), join_world(device, timeout_s=timeout_s):
        pass

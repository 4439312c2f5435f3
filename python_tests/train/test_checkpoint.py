"""Checkpoints are whole or absent: a full disk, an error or a kill while writing leaves the previous one whole."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from opd_engine.distillation.actor import Saved
from opd_engine.distillation.config import OPDConfig
from opd_engine.integrations.fsdp import FSDPActor
from opd_engine.integrations.hf.models import load_model
from opd_engine.parallel.launch import World
from opd_engine.train.checkpoint import (
    CheckpointError,
    checkpoint_folder,
    list_checkpoints,
    load_state,
)
from opd_engine.train.checkpoints import Checkpoints
from opd_engine.train.examples.arithmetic import make_tokenizer
from opd_engine.whole_files import remove_leftovers, whole_or_absent, write_text
from tiny_models import wide_qwen3

ALONE = World(0, 1, 0, torch.device("cpu"))


class Writes:
    """Of an actor, what a checkpoint asks for."""

    def __init__(self, value: float = 1.0, numbers: int = 3) -> None:
        self.weight = torch.full((numbers,), value)

    def save(self, folder: Path) -> Saved:
        (folder / "model.bin").write_bytes(b"m" * 1000)
        with open(folder / "actor.pt", "wb") as file:
            torch.save({"weight": self.weight}, file)
        return Saved()

    def load(self, folder: Path) -> None:
        self.weight = torch.load(folder / "actor.pt", weights_only=True)["weight"]


def checkpoints(directory: Path, actor, keep: int = 2) -> Checkpoints:
    return Checkpoints(directory, keep, ALONE, actor, lambda folder: None)


def save(directory: Path, step: int, keep: int = 2, value: float = 1.0) -> Path:
    checkpoints(directory, Writes(value), keep).save(step, {"step": step})
    return checkpoint_folder(directory, step)


def steps(directory: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(directory)]


def assert_whole(path: Path, step: int) -> None:
    actor = Writes(0.0)
    assert checkpoints(path.parent, actor).load(path) == load_state(path) == {"step": step}
    assert torch.equal(actor.weight, torch.ones(3))
    assert (path / "model.bin").stat().st_size == 1000


def test_what_is_saved_comes_back_and_only_the_newest_are_kept(tmp_path):
    for step in (0, 10, 20, 30):
        save(tmp_path, step)
    assert steps(tmp_path) == [20, 30]
    assert_whole(list_checkpoints(tmp_path)[-1][1], 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000030"]


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 5, value=2.0)
    assert_whole(tmp_path / "step_00000005", 5)


@pytest.mark.parametrize("where", ["model", "state", "sync", "rename"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole_and_says_so(tmp_path, monkeypatch, where):
    save(tmp_path, 1)

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "model":
        monkeypatch.setattr(Path, "write_bytes", full)
    elif where == "state":
        monkeypatch.setattr(torch, "save", full)
    elif where == "sync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(os, "rename", full)
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, 2)
    assert "No space left on device" in str(error.value) and "step 2" in str(error.value)
    assert "step_00000001, is whole" in str(error.value) and "by the same command" in str(error.value)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"], "nothing half written is left"
    assert_whole(tmp_path / "step_00000001", 1)
    save(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


def test_a_disk_that_takes_no_more_is_told_in_the_systems_words(tmp_path):
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large .*; the previous one, .*step_00000001, is whole"):
            checkpoints(tmp_path, Writes(numbers=100_000)).save(2, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert_whole(tmp_path / "step_00000001", 1)


def test_the_first_checkpoint_says_that_there_is_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(CheckpointError, match="there is none yet"):
        save(tmp_path, 0)


# Writes checkpoint after checkpoint, slowly enough inside one that a kill lands there, and says when it has begun.
WRITER = """
import sys, time
from pathlib import Path
import torch
from opd_engine.distillation.actor import Saved
from opd_engine.parallel.launch import World
from opd_engine.train.checkpoints import Checkpoints

class Slow:
    def save(self, folder):
        (folder / "model.bin").write_bytes(b"m" * 500)
        if step == 3:
            print("writing", flush=True)
            time.sleep(60)
        with open(folder / "model.bin", "ab") as file:
            file.write(b"m" * 500)
        torch.save({"weight": torch.ones(3)}, folder / "actor.pt")
        return Saved()

checkpoints = Checkpoints(Path(sys.argv[1]), 2, World(0, 1, 0, torch.device("cpu")), Slow(), lambda folder: None)
for step in range(1, 1000):
    checkpoints.save(step, {"step": step})
"""


def test_a_kill_while_writing_leaves_the_previous_checkpoint_whole(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"writing\n"
        os.kill(writer.pid, signal.SIGKILL)
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    assert steps(tmp_path) == [1, 2]
    assert_whole(tmp_path / "step_00000002", 2)
    assert len(list(tmp_path.iterdir())) == 3, "the half-written folder lies beside, under another name"
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


KILLED_ANYWHERE = WRITER.replace("if step == 3:", "if step == 1:").replace("time.sleep(60)", "pass")


@pytest.mark.parametrize("delay", [0.05, 0.11, 0.23])
def test_a_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path, delay):
    writer = subprocess.Popen([sys.executable, "-c", KILLED_ANYWHERE, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        writer.stdout.readline()
        deadline = time.monotonic() + 30
        while not steps(tmp_path) and time.monotonic() < deadline:
            pass
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    found = list_checkpoints(tmp_path)
    assert found
    for step, path in found:
        assert_whole(path, step)


def test_text_is_replaced_at_one_moment(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_that_exists_is_not_written_over(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError), whole_or_absent(tmp_path / "model"):
        pass


@pytest.mark.parametrize("name", ["actor.pt", "trainer.json"])
def test_a_damaged_file_is_an_error_that_names_the_checkpoint(tmp_path, name):
    path = save(tmp_path, 4)
    (path / name).write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match="step_00000004"):
        checkpoints(tmp_path, Writes()).load(path)


def test_a_pickle_in_the_state_is_refused(tmp_path):
    path = save(tmp_path, 4)
    torch.save({"weight": Path("anything that only pickle can rebuild")}, path / "actor.pt")
    with pytest.raises(CheckpointError, match="step_00000004"):
        checkpoints(tmp_path, Writes()).load(path)


def transformers_actor(seed: int = 0) -> FSDPActor:
    model = wide_qwen3(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return FSDPActor(model, optimizer, OPDConfig(k=4), tokenizer=make_tokenizer())


def test_transformers_reads_a_checkpoint(tmp_path):
    actor = transformers_actor()
    kept = checkpoints(tmp_path, actor)
    kept.save(7, {})
    kept.finish()
    path = checkpoint_folder(tmp_path, 7)
    loaded = load_model(path)
    for (name, ours), (_, theirs) in zip(actor.model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_weights_that_are_not_finite_are_not_saved_and_the_last_good_ones_stay(tmp_path):
    actor = transformers_actor()
    kept = checkpoints(tmp_path, actor)
    kept.save(3, {})
    with actor.weights.training(), torch.no_grad():
        actor.model.model.norm.weight[5] = float("nan")
    with pytest.raises(CheckpointError, match=r"step 4 .*model.norm.weight are not finite.*step_00000003, is whole"):
        kept.save(4, {})
    assert steps(tmp_path) == [3] and len(list(tmp_path.iterdir())) == 1

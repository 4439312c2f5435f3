"""A dead teacher ends the run by name; a checkpoint that is not whole is refused by file, before anything is loaded."""

import json
import math

import pytest
import torch

from distillation_toys import ToyBackend, toy_batch
from opd_engine.distillation import OPDConfig, pack_rollouts, score_rollouts
from opd_engine.teachers import DeadTeacherError, LocalTeacher, TeacherPool, check_safetensors_folder

VOCAB = 29


class Answering(ToyBackend):
    """A toy whose logits are replaced."""

    def __init__(self, change):
        super().__init__(VOCAB, seed=4)
        self.logits = lambda batch: change(self.module(batch))


def score(change, k=4, support="student", batch=None):
    pool = TeacherPool({"good": LocalTeacher(ToyBackend(VOCAB, seed=3)), "math": LocalTeacher(Answering(change))})
    batch = batch or toy_batch(6, teacher_names=["good", "math"] * 3)
    tail = "bucket"
    return score_rollouts(batch, ToyBackend(VOCAB), pool, OPDConfig(k=k, support=support, tail=tail))


def one_row(logits):
    return logits[:1].expand_as(logits)


@pytest.mark.parametrize("support", ["student", "teacher", "union", "rollout"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda z: z * math.nan, "NaN in [0-9]+ of [0-9]+ rows, first in sample [135]$"),
        (lambda z: z * 0, f"all [0-9]+ scores are -3.3673 .-log {VOCAB}"),
        (lambda z: z * 0 + 1e-6 * z, f"-log {VOCAB}"),
    ],
    ids=["nan", "zeros", "nearly zeros"],
)
def test_a_dead_teacher_is_named(change, words, support):
    with pytest.raises(DeadTeacherError, match=f"teacher 'math': .*{words}"):
        score(change, support=support)


def test_a_teacher_that_sees_nothing_or_knows_no_id_is_named():
    with pytest.raises(DeadTeacherError, match="one and the same distribution in all"):
        score(one_row)
    with pytest.raises(DeadTeacherError, match="no mass on any of the"):
        score(
            lambda z: torch.cat([z[:, :-2] - math.inf, z[:, -2:]], 1), batch=asked_below(VOCAB - 2), support="rollout"
        )


def asked_below(limit):
    return pack_rollouts([[1], [2]], [list(range(10)), list(range(10, 20))], teacher_names=["math", "good"])


def test_scores_that_are_no_distribution_are_named():
    """A server that answers zeros for everything it was asked."""

    class Zeros(LocalTeacher):
        def score(self, batch, indices, *, target=None, temperature=1.0):
            found = super().score(batch, indices, target=target, temperature=temperature)
            found.log_probs.zero_()
            return found

    pool = TeacherPool({"far": Zeros(ToyBackend(VOCAB, seed=3))})
    with pytest.raises(DeadTeacherError, match="teacher 'far': support and tail should have probability 1 together"):
        score_rollouts(toy_batch(), ToyBackend(VOCAB), pool, OPDConfig(k=4))


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z,
        lambda z: z * 0.02,  # hardly trained
        lambda z: z * 200,  # certain of everything
        lambda z: z - z.logsumexp(1, keepdim=True),
        lambda z: z.masked_fill(z < z.topk(3).values[:, -1:], -math.inf),  # three tokens have all the mass
    ],
    ids=["plain", "nearly flat", "certain", "normalised", "sparse"],
)
@pytest.mark.parametrize("support", ["student", "rollout"])
def test_teachers_that_are_alive_pass(change, support):
    score(change, support=support)
    score(change, k=1, support=support)
    # One context, one answer, many times over: honestly the same score everywhere.
    same = pack_rollouts([[5]] * 12, [[7]] * 12, teacher_names=["math"] * 12)
    score(change, support=support, batch=same)


# ---- checkpoint files ------------------------------------------------------------------------------------------------
@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index, written by the library that everybody writes them with."""
    files = pytest.importorskip("safetensors.torch")
    shards = {
        "model-00001-of-00002.safetensors": {"a.weight": torch.randn(4, 3), "a.bias": torch.zeros(0)},
        "model-00002-of-00002.safetensors": {"b.weight": torch.randn(5).bfloat16(), "n": torch.tensor(3)},
    }
    for name, tensors in shards.items():
        files.save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    listed = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return tmp_path


def refused(folder, words):
    with pytest.raises(ValueError, match=f"^teacher 'math': .*{words}"):
        check_safetensors_folder(folder, argument="teacher 'math'")


def test_whole_checkpoints_pass(sharded, tmp_path_factory):
    found = check_safetensors_folder(sharded, argument="x")
    assert set(found) == {"a.weight", "a.bias", "b.weight", "n"} and found["n"].name.startswith("model-00002")
    single = tmp_path_factory.mktemp("single")
    (sharded / "model-00001-of-00002.safetensors").rename(single / "model.safetensors")
    assert set(check_safetensors_folder(single, argument="x")) == {"a.weight", "a.bias"}


def test_broken_checkpoints_are_refused_by_file(sharded, tmp_path):
    second = sharded / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    for cut in (0, 7, 8, 40, len(whole) - 1):
        second.write_bytes(whole[:cut])
        refused(sharded, f"{second} is cut short")
    second.write_bytes(whole + b"x")
    refused(sharded, f"{second} is too long")
    second.write_bytes(whole.replace(b'"BF16"', b'"BF17"').replace(b'"dtype"', b'"dtYpe"'))
    refused(sharded, f"the header of {second} does not read")
    second.write_bytes(whole.replace(b'"shape":[5]', b'"shape":[9]'))
    refused(sharded, "does not fill bytes")
    second.unlink()
    refused(sharded, f"1 of 2 shards missing in .*: {second.name}")
    second.write_bytes(whole)
    index = sharded / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace('"n"', '"m"'))
    refused(sharded, f"promises m in {second.name}, which does not hold it")
    index.write_text(text.replace(second.name, "../" + second.name))
    refused(sharded, "wanted a file beside it")
    index.write_text("[]")
    refused(sharded, "does not read as an index")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "wanted model.safetensors or model.safetensors.index.json")

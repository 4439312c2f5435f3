"""Teachers kept as hidden states: the student chooses its top-k while it trains, and the old policy makes no pass."""

import pytest
import torch

from distillation.step_reference import agree, ours
from distillation_toys import ProjectingToy, ToyBackend, toy_batch
from opd_engine.distillation import Denominators, OPDConfig, distillation_loss, score_rollouts
from opd_engine.teachers import DeadTeacherError, LocalTeacher, TeacherPool, TeacherSpec

VOCAB = 29
SPECS = (TeacherSpec("a"), TeacherSpec("b", weight=2.0, temperature=0.8), TeacherSpec("c", weight=0.5))
WIDTHS = {"a": 29, "b": 33, "c": 24}


def world(mixture="route", teacher_tokens=False, **fields):
    names = ["a", "b", "c", "b", "c", "a"] if mixture == "route" else ["", ("a", "b"), "c", "", "", "b"]
    batch = toy_batch(6, teacher_names=names, vocab=24, **fields)
    specs = [TeacherSpec("a", teacher_tokens=teacher_tokens), *SPECS[1:]]
    teachers = [(spec, LocalTeacher(ProjectingToy(WIDTHS[spec.name], seed=5 + i))) for i, spec in enumerate(specs)]
    return batch, ToyBackend(VOCAB, seed=1, padding=3), TeacherPool(teachers)


@pytest.mark.parametrize("mixture", ["route", "arithmetic", "geometric", "loss_sum"])
@pytest.mark.parametrize("parts", [None, 1, 2])
def test_loss_gradient_and_metrics_are_those_of_two_passes(mixture, parts):
    batch, student, pool = world(mixture)
    options = {"k": 4, "mixture": mixture, "divergence": "forward_kl", "temperature": 1.2}
    micros = None if parts is None else batch.micro_batches(max_seqs=parts)
    truth = ours(batch, student, pool, OPDConfig(**options), micros)
    student.forward_rows.clear()
    config = OPDConfig(keep_teacher_hidden=True, **options)
    got = ours(batch, student, pool, config, micros)
    assert sum(student.forward_rows) == batch.num_tokens  # the training forward, and no pass before it
    assert agree(got, truth[:2], 1e-13)
    for name, value in truth[2].items():
        assert got[2][name] == pytest.approx(value, rel=1e-10, abs=1e-13, nan_ok=True), name
    # Control: with another student in training than the one that chooses, the two differ.
    assert not agree(ours(batch, student, pool, OPDConfig(**options), micros, old=ToyBackend(VOCAB, seed=9)), got[:2])


def test_a_teacher_with_its_own_prompt():
    prompts = [torch.tensor([3, 4, 5]), None, None, None, None, torch.tensor([7, 8])]
    batch, student, pool = world(teacher_tokens=True)
    batch.teacher_prompts = prompts
    plain = ours(batch, student, pool, OPDConfig(k=4, divergence="forward_kl"))
    got = ours(batch, student, pool, OPDConfig(k=4, divergence="forward_kl", keep_teacher_hidden=True))
    assert agree(got, plain[:2], 1e-13)
    batch.teacher_prompts = None
    other = ours(batch, student, pool, OPDConfig(k=4, divergence="forward_kl", keep_teacher_hidden=True))
    assert not agree(other, plain[:2], 1e-3)


def test_bytes_and_their_release():
    batch, student, pool = world()
    config = OPDConfig(k=4, keep_teacher_hidden=True)
    scored = score_rollouts(batch, student, pool, config)
    width = {"a": 29, "b": 33, "c": 24}
    rows = dict.fromkeys(width, 0)
    for name, count in zip(batch.teacher_names, batch.loss_row_counts().tolist()):
        rows[name] += count
    assert scored.nbytes == sum(8 * rows[name] * width[name] for name in rows)  # float64 toys
    scored.release(batch)
    assert scored.nbytes == 0 and not scored.heads


def test_one_optimizer_step_a_rollout():
    batch, student, pool = world()
    config = OPDConfig(k=4, keep_teacher_hidden=True)
    scored = score_rollouts(batch, student, pool, config)
    first, second = batch.select([0, 1, 2]), batch.select([3, 4, 5])
    denominators = Denominators.of(first, config)
    distillation_loss(student.logits(first), first, scored, config, None, denominators)
    scored.release(first)
    with pytest.raises(ValueError, match="keep_teacher_hidden: the student has been updated since"):
        distillation_loss(student.logits(second), second, scored, config, None, Denominators.of(second, config))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer_steps_per_rollout": 2}, "keep_teacher_hidden: needs optimizer_steps_per_rollout 1, got 2"),
        ({"support": "teacher"}, "keep_teacher_hidden: needs support 'student', got 'teacher'"),
        ({"measure_overlap": True}, "keep_teacher_hidden: needs measure_overlap False"),
    ],
)
def test_refused_with_the_reason(options, words):
    with pytest.raises(ValueError, match=words):
        OPDConfig(keep_teacher_hidden=True, **options).validate()


def test_teachers_that_cannot_are_refused_by_name():
    batch, student, _ = world()
    batch.teacher_names = ["a"] * 6
    config = OPDConfig(k=4, keep_teacher_hidden=True)
    for backend, options, words in (
        (ToyBackend(VOCAB), {}, "keep_teacher_hidden: teacher 'a': hidden: .* its head is not apart"),
        (ProjectingToy(VOCAB), {"scoring": torch.no_grad}, "teacher 'a': .* its weights are not there between"),
    ):
        with pytest.raises(ValueError, match=words):
            score_rollouts(batch, student, TeacherPool({"a": LocalTeacher(backend, **options)}), config)

    class Scores:
        vocab_size = VOCAB

        def score(self): ...

        def topk(self): ...

        def token_to_id(self):
            return None

    with pytest.raises(ValueError, match="wanted hidden states of teacher 'a', but Scores gives scores only"):
        score_rollouts(batch, student, TeacherPool({"a": Scores()}), config)


def test_a_dead_teacher_ends_the_run_before_training():
    batch, student, pool = world()
    batch.teacher_names = ["a"] * 6
    model = pool["a"].backend.module
    pool["a"].backend.hidden = lambda micro: model(micro) * 0
    config = OPDConfig(k=4, keep_teacher_hidden=True)
    with pytest.raises(DeadTeacherError, match="its head gives one and the same logit"):
        score_rollouts(batch, student, pool, config)
    pool["a"].backend.hidden = lambda micro: model(micro).masked_fill(torch.ones(1, dtype=torch.bool), torch.nan)
    with pytest.raises(DeadTeacherError, match=r"teacher 'a': NaN in \d+ of \d+ rows, first in sample 0"):
        score_rollouts(batch, student, pool, config)

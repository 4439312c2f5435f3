"""Inference-only teachers: what they hold, when their weights move, and that the student is untouched by all of it."""

import functools

import pytest
import torch
from torch import nn

from distillation.step_reference import VOCAB, agree, ours, parameters_grad
from distillation_toys import ToyBackend, toy_batch
from opd_engine.distillation import Denominators, OPDConfig, distillation_loss, score_rollouts
from opd_engine.teachers import (
    LocalTeacher,
    StagedWeights,
    TeacherPool,
    TeacherSpec,
    WeightStore,
    inference_only,
)

TASKS = ["a", "b", "c", "a", "b", "c"]


def switched(student, weights, tag):
    return LocalTeacher(student, scoring=functools.partial(weights.active, tag))


def same_shape_pool(order):
    """(student, weights, pool by switching, pool of separate modules): the same three teachers both ways."""
    student = ToyBackend(VOCAB, seed=1)
    weights = WeightStore(student.module)
    separate = {name: ToyBackend(VOCAB, seed=20 + i) for i, name in enumerate("abc")}
    for name in order:
        weights.load(f"teacher:{name}", separate[name].module.state_dict())
    pool = TeacherPool({name: switched(student, weights, f"teacher:{name}") for name in "abc"})
    return student, weights, pool, TeacherPool({name: LocalTeacher(backend) for name, backend in separate.items()})


@pytest.mark.parametrize("support", ["student", "teacher", "union"])
@pytest.mark.parametrize(("mixture", "order"), [("route", "abc"), ("route", "cab"), ("arithmetic", "bca")])
def test_one_module_that_wears_three_teachers_gives_what_four_modules_give(mixture, order, support):
    """Loss, first gradient and metrics are bit for bit those of separate modules, whatever the order of loading."""
    student, weights, pool, separate = same_shape_pool(order)
    names = TASKS if mixture == "route" else [""] * 6
    batch = toy_batch(6, teacher_names=names)
    config = OPDConfig(k=4, divergence="forward_kl", mixture=mixture, support=support)
    got, truth = ours(batch, student, pool, config), ours(batch, student, separate, config)
    assert got[0] == truth[0] and torch.equal(got[1], truth[1])
    with weights.publishing() as sent:
        assert all(torch.equal(sent[n], p) for n, p in ToyBackend(VOCAB, seed=1).module.named_parameters())
    assert not any(student.modes[-1:])  # the last forward, the student's own, ran as the student was found: in eval


@pytest.mark.parametrize("failing", ["a", "b", "c"])
def test_an_exception_inside_a_teachers_pass_leaves_the_student(failing):
    student, weights, pool, _ = same_shape_pool("abc")
    batch = toy_batch(6, teacher_names=TASKS)
    config = OPDConfig(k=4, divergence="forward_kl")
    truth = ours(batch, student, pool, config)
    plain = student.logits

    def logits(micro):
        if weights.active_tag == f"teacher:{failing}":
            raise RuntimeError("out of memory")
        return plain(micro)

    student.logits = logits
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        score_rollouts(batch, student, pool, config)
    # The traceback, with every frame in it, is still alive here: nothing may wait for its end to clean up.
    assert caught.tb is not None and weights.active_tag == "student"
    student.logits = plain
    assert agree(ours(batch, student, pool, config), truth[:2], 0.0)
    with weights.training():
        pass


def test_self_distillation_from_an_earlier_copy_and_a_running_mean():
    student = ToyBackend(VOCAB, seed=1)
    start = ToyBackend(VOCAB, seed=1)
    weights = WeightStore(student.module)
    weights.back_up("student:start")
    weights.blend("student:mean", 0.5)
    pool = TeacherPool(
        {"start": switched(student, weights, "student:start"), "mean": switched(student, weights, "student:mean")}
    )
    batch = toy_batch(6, teacher_names=["start", "mean"] * 3)
    config = OPDConfig(k=4, divergence="forward_kl")
    assert ours(batch, student, pool, config)[0] == pytest.approx(0.0, abs=1e-12)  # nobody has moved yet
    with weights.training(), torch.no_grad():
        student.module.own.add_(torch.randn(student.module.own.shape, generator=torch.Generator().manual_seed(0)))
    weights.blend("student:mean", 0.5)
    mean = ToyBackend(VOCAB, seed=1)
    with torch.no_grad():
        mean.module.own.copy_((start.module.own + student.module.own) / 2)
    truth = TeacherPool({"start": LocalTeacher(start), "mean": LocalTeacher(mean)})
    assert agree(ours(batch, student, pool, config), ours(batch, student, truth, config)[:2], 1e-12)


def test_teachers_that_see_another_prompt_score_the_same_tokens_when_switched():
    student, weights, _, separate = same_shape_pool("abc")
    batch = toy_batch(4, teacher_names=["a"] * 4)
    batch.teacher_prompts = [torch.tensor([3, 1, 4]), None, torch.tensor([9]), torch.tensor([2, 2])]
    spec = TeacherSpec("a", teacher_tokens=True)
    config = OPDConfig(k=4, divergence="forward_kl")
    got = ours(batch, student, TeacherPool([(spec, switched(student, weights, "teacher:a"))]), config)
    truth = ours(batch, student, TeacherPool([(spec, separate["a"])]), config)
    assert got[0] == truth[0] and torch.equal(got[1], truth[1])
    assert ours(batch, student, TeacherPool({"a": separate["a"]}), config)[0] != truth[0]  # the prompt matters


# ---- weights that wait on the host -----------------------------------------------------------------------------------
class Copied(StagedWeights):
    """Stands in for another device: a copy is a copy, though both are the host's. Writes down what happens when."""

    def __init__(self, module, name="", log=None, **options):
        self.name, self.log = name, [] if log is None else log
        super().__init__(module, "cpu", **options)
        self._moves = True

    def _bring(self, host):
        return host.clone()

    def prefetch(self):
        if self._on_way is None:
            self.log.append(f"bring {self.name}")
        super().prefetch()

    def on_device(self):
        self.log.append(f"turn {self.name}")
        return super().on_device()


class Staged(ToyBackend):
    """A toy whose weights are staged; asserts that it computes with the copy."""

    def __init__(self, seed, log, name, everyone):
        super().__init__(VOCAB, seed=seed)
        self.log, self.everyone = log, everyone
        self.staged = Copied(self.module, name, log)
        self.home = [p.data_ptr() for p in self.module.parameters()]
        everyone.append(self.staged)

    def logits(self, batch):
        assert not set(self.home) & {p.data_ptr() for p in self.module.parameters()}, "scored with what is idle"
        self.log.append(f"held {''.join(s.name for s in self.everyone if s.is_on_device)}")
        return super().logits(batch)


def test_one_teacher_ahead_and_none_left_when_the_student_trains():
    log, everyone = [], []
    backends = {name: Staged(20 + i, log, name, everyone) for i, name in enumerate("abc")}
    before = {n: [p.clone() for p in b.module.parameters()] for n, b in backends.items()}
    pool = TeacherPool(
        {n: LocalTeacher(b, scoring=b.staged.on_device, prefetch=b.staged.prefetch) for n, b in backends.items()}
    )
    batch = toy_batch(6, teacher_names=["c", "a", "c", "a", "a", "c"])  # b has nothing to score
    score_rollouts(batch, ToyBackend(VOCAB), pool, OPDConfig(k=4))
    assert log == ["bring a", "bring c", "turn a", "held ac", "turn c", "held c"]
    assert not any(staged.is_on_device for staged in everyone)
    for name, backend in backends.items():
        assert [p.data_ptr() for p in backend.module.parameters()] == backend.home
        for now, then in zip(backend.module.parameters(), before[name], strict=True):
            assert torch.equal(now, then) and not now.requires_grad and now.grad is None
        assert not backend.module.training


def test_resident_teachers_stay_and_failing_ones_leave():
    module = nn.Linear(3, 2)
    weight = module.weight.detach().clone()
    home = module.weight.data_ptr()
    staged = Copied(module, resident=True)
    for _ in range(2):
        with staged.on_device():
            module.train()
        assert staged.is_on_device and module.weight.data_ptr() != home and not module.training
    staged = Copied(nn.Linear(3, 2))
    with pytest.raises(KeyError), staged.on_device():
        raise KeyError
    assert not staged.is_on_device and staged.nbytes == 4 * 8
    tied = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    tied[1].weight = tied[0].weight
    module = nn.Linear(3, 2)
    module.weight.data.copy_(weight)
    here = StagedWeights([module, tied], "cpu")
    place = module.weight.data_ptr()
    with here.on_device():
        assert (
            module.weight.data_ptr() == place
            and torch.equal(module.weight, weight)
            and tied[1].weight is tied[0].weight
        )
    assert not here.is_on_device and here.nbytes == 4 * (8 + 8)


def test_a_trained_module_is_refused_as_a_teacher():
    module = nn.Linear(3, 2)
    module(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match="wanted one without a trainer around it, got grad on weight"):
        inference_only(module)
    module.zero_grad()
    module.bias.main_grad = torch.zeros(2)
    with pytest.raises(ValueError, match="got main_grad on bias"):
        StagedWeights(module, "cpu")


def test_a_teachers_pass_builds_no_graph_and_leaves_no_gradient():
    backend = ToyBackend(VOCAB, seed=5)
    inference_only(backend.module)
    student, batch = ToyBackend(VOCAB), toy_batch(3)
    config = OPDConfig(k=4, divergence="forward_kl")
    scored = score_rollouts(batch, student, TeacherPool({"t": LocalTeacher(backend)}), config)
    assert not scored.teacher("t", batch).log_probs.requires_grad
    loss, _ = distillation_loss(student.logits(batch), batch, scored, config, None, Denominators.of(batch, config))
    assert bool(parameters_grad(loss, student).any())
    assert all(p.grad is None and not p.requires_grad for p in backend.module.parameters())

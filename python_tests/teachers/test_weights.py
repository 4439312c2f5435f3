"""The weights that train are the only ones that are trained, published, saved or copied, whatever comes between."""

import io

import pytest
import torch
from torch import nn

from opd_engine.teachers import WeightStore, WrongWeightsError
from opd_engine.teachers.fingerprint import fingerprint

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


class Router(nn.Module):
    """Parameters, a persistent buffer, one that no checkpoint holds, and extra state; it forgets modes as some do."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(6, 5, generator=generator))
        self.register_buffer("expert_bias", torch.randn(6, generator=generator))
        self.register_buffer("tokens_per_expert", torch.full((6,), float(seed)), persistent=False)
        self.scale = {"amax": float(seed)}

    def forward(self, values):
        return values @ self.weight.T + self.expert_bias + self.scale["amax"]

    def get_extra_state(self):
        return self.scale

    def set_extra_state(self, state):
        self.scale = state


class Model(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 5)
        self.router = Router(seed)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        states = self.router(self.dropout(self.embedding(tokens)))
        return self.norm(states)[:, :5] @ self.head.weight.T


def everything(modules) -> list:
    """All that a checkpoint could hold and all that it could not."""
    found = []
    for module in modules if isinstance(modules, list) else [modules]:
        found += [t.detach().clone() for t in (*module.parameters(), *module.buffers())]
        found += [dict(part.scale) for part in module.modules() if isinstance(part, Router)]
        found += [part.training for part in module.modules()]
    return found


def same(left: list, right: list) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left, right, strict=True))


def a_step(model: Model, weights: WeightStore) -> None:
    with weights.training(), torch.no_grad():
        model.router.weight.add_(0.01)


@pytest.mark.parametrize("chunks", [False, True], ids=["module", "chunks"])
def test_every_way_out_of_a_block_leads_back_to_the_trainable_weights(chunks):
    """Teachers in any order, evaluation, modes changed inside, exceptions, an interrupt, a closed generator."""
    make = (lambda seed: [Model(seed), Model(seed + 50)]) if chunks else Model
    live, first, second = make(1), make(2), make(3)
    prefixed = lambda m: {f"{i}.{k}": v for i, c in enumerate(m) for k, v in c.state_dict().items()}  # noqa: E731
    state = prefixed if chunks else (lambda m: m.state_dict())
    some = live[0] if chunks else live
    some.norm.eval()
    before = everything(live)
    weights = WeightStore(live)
    weights.load("teacher:b", state(second))
    weights.load("teacher:a", state(first))
    assert weights.tags == ("student", "teacher:b", "teacher:a") and same(everything(live), before)

    for tag, model in (("teacher:a", first), ("teacher:b", second), ("teacher:a", first)):
        theirs = model[0] if chunks else model
        with weights.active(tag):
            assert weights.active_tag == tag and not torch.is_grad_enabled() and not some.training
            assert torch.equal(some.router.weight, theirs.router.weight) and some.router.scale == theirs.router.scale
            assert torch.equal(some.router.expert_bias, theirs.router.expert_bias)
            assert (
                torch.equal(some.embedding.weight, theirs.embedding.weight)
                and some.head.weight is some.embedding.weight
            )
            theirs.eval()
            assert torch.equal(some(torch.arange(4)) - theirs(torch.arange(4)), torch.zeros(4, 7))
            some.train()  # as a framework's forward-only pass ends
        assert same(everything(live), before) and torch.is_grad_enabled()

    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), weights.active("teacher:b"):
            some.router.scale["amax"] = -1.0
            raise error("inside a teacher's pass")
        assert same(everything(live), before) and weights.active_tag == "student"

    def scoring():
        with weights.active("teacher:a"):
            yield

    stopped = scoring()
    next(stopped)
    stopped.close()
    assert same(everything(live), before)
    for guard in (weights.publishing, weights.saving, weights.training):
        with guard():
            pass
    # The teachers are what they were, too.
    with weights.active("teacher:a"):
        assert torch.equal(some.norm.weight, (first[0] if chunks else first).norm.weight)


def test_a_copy_that_fails_half_way_is_undone():
    model = Model(1)
    weights = WeightStore(model)
    weights.load("teacher:a", Model(2).state_dict())
    before = everything(model)
    weights._sets["teacher:a"].tensors["norm.weight"] = torch.zeros(99)
    with pytest.raises(RuntimeError), weights.active("teacher:a"):
        raise AssertionError("never entered")
    assert same(everything(model), before) and weights.active_tag == "student"


@pytest.mark.parametrize("what", ["training", "publishing", "saving", "back_up", "blend", "accept_live", "active"])
def test_every_guard_fires_while_a_teacher_is_live(what):
    """Each names both tags; and none fires once the block is left."""
    weights = WeightStore(Model(1))
    weights.load("teacher:a", Model(2).state_dict())
    weights.load("teacher:b", Model(3).state_dict())
    arguments = {"back_up": ("student:old",), "blend": ("student:ema", 0.5), "active": ("teacher:b",)}.get(what, ())

    def attempt():
        asked = getattr(weights, what)(*arguments)
        if what in ("training", "publishing", "saving", "active"):
            with asked:
                pass

    with weights.active("teacher:a"), pytest.raises(WrongWeightsError, match="'teacher:a'"):
        attempt()
    assert "student:old" not in weights.tags and "student:ema" not in weights.tags
    attempt()


def test_weights_written_outside_a_train_step_are_found_by_content():
    """The tag is right and the content is not: a checkpoint read through the live model, one bit, a stray step."""
    model = Model(1)
    weights = WeightStore(model)
    weights.load("teacher:math", Model(2).state_dict())
    a_step(model, weights)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    for guard in (weights.training, weights.publishing, weights.saving):
        with guard():
            pass

    for name in ("norm.num_batches_tracked", "norm.running_mean", "router.expert_bias", "embedding.weight"):
        tensor = model.state_dict()[name]
        with torch.no_grad():
            tensor.view(-1)[-1:].copy_(tensor.view(-1)[-1:] + 1)
        for guard in (weights.training, weights.publishing, weights.saving):
            with pytest.raises(WrongWeightsError, match=f"outside a train step: 1 tensors changed .{name}"), guard():
                pass
        with torch.no_grad():
            tensor.copy_(kept[name])
    model.load_state_dict(Model(2).state_dict())
    model.router.tokens_per_expert.fill_(2.0)
    weights.load("teacher:math", Model(2).state_dict())
    with pytest.raises(WrongWeightsError, match="they are those of 'teacher:math'"), weights.publishing():
        pass
    with pytest.raises(WrongWeightsError, match="the live weights are those of 'teacher:math'"):
        weights.accept_live()
    model.load_state_dict(Model(4).state_dict())
    weights.accept_live()  # a student's checkpoint, resumed from
    with weights.publishing() as sent:
        assert torch.equal(sent["router.weight"], Model(4).router.weight)
        with pytest.raises(WrongWeightsError, match="in a publish"), weights.active("teacher:math"):
            pass


def test_the_first_gradient_after_teachers_is_the_students():
    model, reference = Model(1), Model(1)
    weights = WeightStore(model)
    for tag, seed in (("teacher:b", 3), ("teacher:a", 2)):
        weights.load(tag, Model(seed).state_dict())
        with weights.active(tag):
            model(torch.arange(4))
    for one in (model, reference):
        one.dropout.p = 0.0
        one(torch.arange(6)).square().sum().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_graph_from_before_a_switch_does_not_run_backward_through_other_weights():
    model = Model(1)
    weights = WeightStore(model)
    weights.load("teacher:a", Model(2).state_dict())
    loss = model(torch.arange(4)).sum()
    with weights.active("teacher:a"), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_checkpoints_are_refused_by_name_and_leave_everything_as_it_was():
    model = Model(1)
    weights = WeightStore(model)
    before = everything(model)

    def state(**changes):
        return {k: v for k, v in {**Model(2).state_dict(), **changes}.items() if v is not None}

    for changes, words in [
        ({"router.expert_bias": None}, "teacher:a: the checkpoint lacks router.expert_bias"),
        ({"lm_head.weight": torch.zeros(1)}, "teacher:a: the checkpoint has unknown lm_head.weight"),
        ({"router.weight": torch.zeros(5, 6)}, r"router.weight: wanted shape \[6, 5\], got \[5, 6\]"),
        ({"head.weight": torch.zeros(7, 5)}, "one tied weight in this model, but the checkpoint has two"),
    ]:
        with pytest.raises(ValueError, match=words):
            weights.load("teacher:a", state(**changes))
    with pytest.raises(ValueError, match="another than the trainable 'student' to load"):
        weights.load("student", state())
    with pytest.raises(ValueError, match="'teacher:a' is not known; known: student"), weights.active("teacher:a"):
        pass
    assert weights.tags == ("student",) and same(everything(model), before)
    weights.load("teacher:a", state(**{"head.weight": None}))  # one name of a tied weight is enough


def test_loading_takes_over_its_own_buffers_and_copies_everything_else():
    """A live model's state dict is live memory: taking it over would let the student's steps change its teacher."""
    model, other = Model(1), Model(2)
    weights = WeightStore(model)
    weights.load("student:start", model.state_dict())
    buffers = weights.host_buffers()
    for name, tensor in other.named_parameters():
        buffers[name].copy_(tensor.detach())
    for name, tensor in other.named_buffers():
        buffers[name].copy_(tensor)
    place = buffers["router.weight"].data_ptr()
    weights.load("teacher:a", buffers)
    assert weights._sets["teacher:a"].tensors["router.weight"].data_ptr() == place
    start = model.router.weight.detach().clone()
    a_step(model, weights)
    with weights.active("student:start"):
        assert torch.equal(model.router.weight, start)
    with weights.active("teacher:a"):
        assert torch.equal(model.router.weight, other.router.weight)


def test_an_earlier_student_and_a_running_mean():
    model = Model(1).to(torch.bfloat16)
    weights = WeightStore(model)
    weights.back_up("student:start")
    mean = model.router.weight.detach().float()
    for _ in range(20):
        a_step(model, weights)
        weights.blend("student:ema", 0.95)
        mean = (
            model.router.weight.detach().float()
            if _ == 0
            else 0.95 * mean + 0.05 * model.router.weight.detach().float()
        )
    held = weights._sets["student:ema"].tensors["router.weight"]
    assert held.dtype == torch.float32  # in bf16 a step of 5% of 0.01 would round to none
    assert torch.allclose(held, mean, atol=1e-6)
    with weights.active("student:ema"):
        assert torch.equal(model.router.weight, held.to(torch.bfloat16))
    with weights.active("student:start"):
        assert not torch.equal(model.router.weight, held.to(torch.bfloat16))
    weights.drop("student:ema")
    assert weights.tags == ("student", "student:start")
    with weights.publishing():
        pass


def test_fingerprints_see_one_bit_an_order_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        tensor = torch.randn(3, 3, generator=generator).mul(50).to(dtype)
        number = fingerprint([tensor])
        assert torch.equal(number, fingerprint([tensor.clone()])) and torch.equal(
            number, fingerprint([tensor.T.contiguous().T])
        )
        changed = tensor.clone()
        changed[2, 2] = not changed[2, 2] if dtype == torch.bool else changed[2, 2] + 1
        assert not torch.equal(number, fingerprint([changed])), dtype
    large = torch.randn(2_500_001, generator=generator)
    number = fingerprint([large])
    for place in (0, (1 << 20) - 1, 1 << 20, 2_500_000):
        changed = large.clone()
        changed[place] = torch.nextafter(changed[place], torch.tensor(9.0))
        assert not torch.equal(number, fingerprint([changed]))
    swapped = large.clone()
    swapped[[5, 1 << 20]] = swapped[[1 << 20, 5]]
    assert not torch.equal(number, fingerprint([swapped]))
    assert torch.equal(fingerprint([large, swapped]), torch.cat([number, fingerprint([swapped])]))
    assert fingerprint([]).numel() == 0 and fingerprint([torch.empty(0), torch.tensor(1.0)]).numel() == 2


def test_extra_state_of_any_kind_travels():
    """Some modules keep bytes, some a tensor, some an open buffer."""

    class Quantised(nn.Linear):
        state = None

        def get_extra_state(self):
            return self.state

        def set_extra_state(self, state):
            self.state = state

    for value in (torch.arange(3), b"bytes", io.BytesIO(b"buffer"), None):
        live, other = Quantised(2, 2), Quantised(2, 2)
        live.state, other.state = "own", value
        weights = WeightStore(live)
        weights.load("teacher:a", other.state_dict())
        with weights.active("teacher:a"):
            assert type(live.state) is type(value) and live.state != "own"
        assert live.state == "own"

"""Named teachers: who is asked, in which order, at which temperature, about which prompt; and how a local one runs."""

import pytest
import torch

from distillation_toys import ProjectingToy, ToyBackend, toy_batch
from opd_engine import gather_log_probs, topk_log_probs
from opd_engine.distillation import pack_rollouts
from opd_engine.parallel.vocab import VocabShard
from opd_engine.teachers import LocalTeacher, Teacher, TeacherPool, TeacherSpec, union_support


def teacher(seed=2, **options) -> LocalTeacher:
    return LocalTeacher(ToyBackend(seed=seed, **options))


def ids_of(batch, k=4, vocab=29):
    generator = torch.Generator().manual_seed(9)
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:k] for _ in range(batch.num_tokens)])
    return ids.masked_fill(~batch.loss_mask[:, None], -1)


def test_pool_keeps_order_and_refuses_what_is_wrong():
    pool = TeacherPool([(TeacherSpec("math", weight=2.0), teacher()), ("code", teacher(3)), ("chat", teacher(4))])
    assert pool.names == ("math", "code", "chat") and list(pool) == list(pool.names) and len(pool) == 3
    assert "code" in pool and "poetry" not in pool and isinstance(pool["code"], Teacher)
    with pytest.raises(ValueError, match="'poetry' is not known; known: math, code, chat"):
        pool["poetry"]
    with pytest.raises(ValueError, match="'code' is given twice"):
        TeacherPool([("code", teacher()), ("code", teacher(3))])
    with pytest.raises(ValueError, match="wanted at least one"):
        TeacherPool([])
    with pytest.raises(ValueError, match="teacher 'x': wanted an object with vocab_size, score"):
        TeacherPool({"x": object()})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": " "}, "non-empty teacher name"),
        ({"name": "t", "checkpoint": "a", "server": "b"}, "a checkpoint or a server, got both"),
        ({"name": "t", "temperature": 0.0}, "temperature: wanted a finite number > 0, got 0.0"),
        ({"name": "t", "weight": -1.0}, "weight: wanted a finite number >= 0, got -1.0"),
        ({"name": "t", "weight": float("nan")}, "weight: wanted a finite number"),
    ],
)
def test_spec_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        TeacherSpec(**options)


def test_routing_one_teacher_a_sample():
    pool = TeacherPool({"a": teacher(), "b": teacher(3)})
    batch = toy_batch(4, teacher_names=["b", "a", "a", "b"])
    weights = pool.route(batch)
    expected = torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.float64)[:, batch.row_sequence()]
    assert torch.equal(weights, expected)
    swapped = pool.route(toy_batch(4, teacher_names=["a", "b", "b", "a"]))
    assert torch.equal(swapped, expected.flip(0))
    assert torch.equal(TeacherPool({"a": teacher()}).route(toy_batch(4)), torch.ones(1, batch.num_tokens).double())
    for names, words in [
        (["b", "a", "nobody", "b"], "'nobody' is not known; known: a, b"),
        (["b", "", "a", "b"], r"teacher_names\[1\]: names no teacher and there are 2; known: a, b"),
        (["b", "a", ("a", "b"), "b"], r"teacher_names\[2\]: mixture 'route' takes one teacher a sample"),
    ]:
        with pytest.raises(ValueError, match=words):
            pool.route(toy_batch(4, teacher_names=names))


def test_routing_several_with_weights_per_run_sample_and_token():
    pool = TeacherPool([(TeacherSpec("a", weight=3.0), teacher()), (TeacherSpec("b"), teacher(3)), ("c", teacher(4))])
    batch = toy_batch(4, teacher_names=["", ("a", "b"), "c", ("c", "a")])
    sequence = batch.row_sequence()
    expected = torch.tensor([[3.0, 3, 0, 3], [1, 1, 0, 0], [1, 0, 1, 1]], dtype=torch.float64)[:, sequence]
    assert torch.equal(pool.route(batch, "arithmetic"), expected)
    by_row = torch.arange(batch.num_tokens, dtype=torch.float64)
    batch.teacher_weights = {"b": torch.tensor([0.5, 0.0, 1.0, 1.0]), "c": by_row}
    got = pool.route(batch, "loss_sum")
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=torch.float64)[sequence])
    assert torch.equal(got[2], by_row * expected[2])
    # The weights travel with their sequences.
    assert torch.equal(
        pool.route(batch.select([3, 0]), "loss_sum"), torch.cat([got[:, sequence == 3], got[:, sequence == 0]], 1)
    )
    batch.teacher_weights = {"c": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"teacher_names\[2\] = 'c': row \d+ counts, but no teacher has a weight"):
        pool.route(batch, "arithmetic")
    batch.teacher_weights = {"b": torch.tensor([0.5, -1.0, 1.0, 1.0])}
    with pytest.raises(ValueError, match=r"teacher_weights\['b'\]: wanted finite weights >= 0, got -1"):
        pool.route(batch, "arithmetic")
    with pytest.raises(ValueError, match="mixture 'route' takes one teacher"):
        pool.route(batch, "route")
    batch.teacher_weights = {"nobody": torch.ones(4)}
    with pytest.raises(ValueError, match="'nobody' is not known"):
        pool.route(batch, "arithmetic")


def same_scores(got, truth, rows):
    for name in ("log_probs", "tail_log_prob", "lse", "entropy", "target_log_prob"):
        ours, theirs = getattr(got, name), getattr(truth, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None and not torch.equal(ours[rows], theirs[rows]):
            return False
    return torch.equal(got.indices[rows], truth.indices[rows])


@pytest.mark.parametrize("kind", [ToyBackend, ProjectingToy])
@pytest.mark.parametrize("max_tokens", [1, 10, 13, 10_000])
def test_local_teacher_scores_like_one_forward_in_bounded_pieces(kind, max_tokens):
    batch = toy_batch(8)
    backend = kind(seed=2, padding=3)
    ids, target = ids_of(batch), batch.next_tokens()
    shard = VocabShard(0, 32, 29)
    logits = backend.module(batch).detach()
    local = LocalTeacher(backend, max_tokens=max_tokens)
    rows = batch.loss_mask
    got = local.score(batch, ids, target=target, temperature=0.7)
    assert same_scores(got, gather_log_probs(logits, ids, target=target, temperature=0.7, shard=shard), rows)
    assert not got.log_probs.requires_grad
    got = local.topk(batch, 5, temperature=0.7)
    assert same_scores(got, topk_log_probs(logits, 5, temperature=0.7, shard=shard), rows)
    longest = max(batch.lengths()) if kind is ToyBackend else 1
    assert max(backend.forward_rows) <= max(max_tokens, longest)
    if kind is ProjectingToy and max_tokens > 100:
        assert max(backend.forward_rows) == int(rows.sum()) < batch.num_tokens  # prompts are not projected
    # Control: the rows of the next token's position are not the same.
    assert not same_scores(got, topk_log_probs(logits.roll(1, 0), 5, temperature=0.7, shard=shard), rows)


def test_local_teacher_is_in_eval_mode_and_left_as_found():
    batch = toy_batch(4)
    backend = ToyBackend(seed=2)
    reference = LocalTeacher(backend).topk(batch, 4)
    backend.module.train()
    backend.module.dropout.eval()  # a submodule's own mode is its owner's choice
    again = LocalTeacher(backend, max_tokens=5).topk(batch, 4)
    assert same_scores(again, reference, batch.loss_mask) and backend.modes[-1] is False
    assert backend.module.training and not backend.module.dropout.training
    assert all(parameter.grad is None for parameter in backend.module.parameters())
    with pytest.raises(IndexError):
        LocalTeacher(backend).topk(pack_rollouts([[1]], [[2, 99]]), 4)
    assert backend.module.training and not backend.module.dropout.training


def test_local_teacher_refusals_and_empty_batch():
    batch = toy_batch(3)
    with pytest.raises(ValueError, match="max_tokens: wanted at least 1, got 0"):
        LocalTeacher(ToyBackend(), max_tokens=0)
    with pytest.raises(ValueError, match=rf"indices: wanted \[num_tokens={batch.num_tokens}, k\], got \[2, 4\]"):
        teacher().score(batch, torch.zeros(2, 4, dtype=torch.int64))
    short = ToyBackend()
    short.logits = lambda batch: torch.zeros(batch.num_tokens - 1, 29)
    with pytest.raises(ValueError, match="logits: wanted"):
        LocalTeacher(short).topk(batch, 3)
    nothing = teacher().topk(batch.select([]), 3)
    assert nothing.indices.shape == (0, 3) and nothing.tail_log_prob.shape == (0,)


def test_each_teacher_scores_at_its_own_temperature():
    batch = toy_batch(3)
    pool = TeacherPool([(TeacherSpec("cold", temperature=0.5), teacher()), (TeacherSpec("own"), teacher())])
    ids = ids_of(batch)
    logits = ToyBackend(seed=2).module(batch).detach()
    for name, temperature in (("cold", 0.5), ("own", 1.3)):
        got = pool.score(name, batch, ids, vocab_size=29, temperature=1.3)
        assert same_scores(got, gather_log_probs(logits, ids, temperature=temperature), batch.loss_mask)
        got = pool.topk(name, batch, 4, vocab_size=29, temperature=1.3)
        assert same_scores(got, topk_log_probs(logits, 4, temperature=temperature), batch.loss_mask)
    assert not same_scores(got, topk_log_probs(logits, 4, temperature=0.5), batch.loss_mask)


def test_narrow_and_wide_teachers_answer_in_the_students_ids():
    batch = toy_batch(5, vocab=13)
    pool = TeacherPool({"narrow": teacher(5, vocab_size=17), "wide": teacher(6, vocab_size=41)})
    ids = ids_of(batch)
    narrow = pool.score("narrow", batch, ids, vocab_size=29, target=batch.next_tokens())
    assert torch.equal(narrow.indices, ids)
    assert bool((narrow.log_probs[ids >= 17] == -torch.inf).all()) and bool((ids >= 17).any())
    assert bool(narrow.log_probs[(ids >= 0) & (ids < 17)].isfinite().all())
    few = pool.topk("narrow", batch, 20, vocab_size=29)
    assert few.indices.shape[1] == 20 and bool((few.indices[batch.loss_mask][:, 17:] == -1).all())
    wide = pool.topk("wide", batch, 6, vocab_size=29)
    assert int(wide.indices.max()) < 29 and bool((wide.indices[batch.loss_mask] == -1).any())
    mass = wide.log_probs.exp().sum(1) + wide.tail_log_prob.exp()
    torch.testing.assert_close(mass[batch.loss_mask], torch.ones_like(mass[batch.loss_mask]))


def test_teacher_that_sees_another_prompt_scores_the_same_tokens():
    """Row by row against the teacher run on its own prompt followed by the student's response."""
    prompts, responses = [[1, 2, 3], [4], [5, 6]], [[7, 8, 9], [10, 11], [12, 13, 14, 15]]
    own_prompts = [[20], None, [21, 22, 23, 24]]
    batch = pack_rollouts(prompts, responses, teacher_prompts=own_prompts)
    pool = TeacherPool([(TeacherSpec("guided", teacher_tokens=True), teacher()), ("plain", teacher())])
    ids = ids_of(batch)
    model = ToyBackend(seed=2).module
    first = 0
    for prompt, own, response in zip(prompts, own_prompts, responses):
        seen = own or prompt
        logits = model(pack_rollouts([seen], [response])).detach()
        there = slice(len(seen) - 1, len(seen) + len(response) - 1)
        here = slice(first + len(prompt) - 1, first + len(prompt) + len(response) - 1)
        truth = gather_log_probs(logits[there], ids[here], target=torch.tensor(response))
        got = pool.score("guided", batch, ids, vocab_size=29, target=batch.next_tokens())
        torch.testing.assert_close(got.log_probs[here], truth.log_probs)
        torch.testing.assert_close(got.tail_log_prob[here], truth.tail_log_prob)
        torch.testing.assert_close(got.target_log_prob[here], truth.target_log_prob)
        top = pool.topk("guided", batch, 4, vocab_size=29, target=batch.next_tokens())
        assert torch.equal(top.indices[here], topk_log_probs(logits[there], 4).indices)
        if own:  # control: the plain teacher, one row off, and the student's prompt all differ
            assert not torch.allclose(pool.score("plain", batch, ids, vocab_size=29).log_probs[here], truth.log_probs)
            assert not torch.allclose(got.log_probs[here].roll(1, 0), truth.log_probs)
        first += len(prompt) + len(response)


def test_teachers_with_other_token_maps_are_refused_by_name():
    tokens = {f"t{i}": i for i in range(29)}
    pool = TeacherPool({"same": teacher(tokens=dict(tokens)), "none": teacher(3)})
    pool.check_vocabulary(tokens)
    pool.check_vocabulary(None)
    pool["none"].backend.tokens = {"t0": 1}
    pool.check_vocabulary(tokens)  # compared before
    with pytest.raises(ValueError, match="teacher 'none' disagree"):
        pool.check_vocabulary(dict(tokens))
    pool = TeacherPool({"same": teacher(tokens=dict(tokens)), "odd": teacher(3, tokens={**tokens, "t3": 4, "t4": 3})})
    with pytest.raises(ValueError, match="maps of student and teacher 'odd' disagree on 2 entries: token 't3' is 3"):
        pool.check_vocabulary(tokens)


class TwoPasses:
    """A teacher that can only do what every teacher can."""

    def __init__(self, inner):
        self.inner, self.vocab_size = inner, inner.vocab_size
        self.score, self.topk, self.token_to_id = inner.score, inner.topk, inner.token_to_id


@pytest.mark.parametrize("cap", [None, 6])
@pytest.mark.parametrize("width", [3, 29, 41])
def test_a_union_takes_one_forward_and_gives_what_two_give(cap, width):
    batch = toy_batch(6)
    student = teacher(1).topk(batch, 4)
    for max_tokens in (10_000, 12):
        local = LocalTeacher(ToyBackend(width, seed=5), max_tokens=max_tokens)
        pool = TeacherPool([(TeacherSpec("t", temperature=0.8), local), ("plain", TwoPasses(local))])
        options = {"cap": cap, "vocab_size": 29, "target": batch.next_tokens()}
        got, dropped, shared = pool.score_union("t", batch, 4, student, **options)
        assert sum(local.backend.forward_rows) == batch.num_tokens  # every token once
        top = pool.topk("t", batch, 4, vocab_size=29)
        union = union_support([student, top], cap)
        truth = pool.score("t", batch, union.indices[:, : got.k], vocab_size=29, target=batch.next_tokens())
        assert not bool((union.indices[:, got.k :] != -1).any())
        assert same_scores(got, truth, batch.loss_mask)
        both = [len(set(s.tolist()) & set(t.tolist()) - {-1}) / 4 for s, t in zip(student.indices, top.indices)]
        assert torch.equal(shared[batch.loss_mask], torch.tensor(both).double()[batch.loss_mask])
        assert torch.equal(dropped[batch.loss_mask], union.dropped[batch.loss_mask])
        assert pool.score_union("plain", batch, 4, student, **options) is None


def test_a_union_with_another_prompt_needs_two_passes():
    pool = TeacherPool([(TeacherSpec("guided", teacher_tokens=True), teacher())])
    batch = toy_batch(2)
    assert pool.score_union("guided", batch, 4, teacher(1).topk(batch, 4), cap=None, vocab_size=29) is None

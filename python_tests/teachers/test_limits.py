"""What a model can take beside what it is given: ids and lengths refused by name, rows that a teacher cannot read."""

import dataclasses
from itertools import pairwise

import pytest
import torch

import oracles
from distillation.step_reference import parameters_grad, reference_buckets
from distillation_toys import ToyBackend
from opd_engine.distillation import Denominators, OPDConfig, distillation_loss, pack_rollouts, score_rollouts
from opd_engine.distillation.full_rows import full_divergence
from opd_engine.distillation.head import HiddenRows
from opd_engine.distillation.micro_loss import RowsHere, micro_loss
from opd_engine.distillation.step import row_divergences
from opd_engine.parallel.vocab import VocabShard
from opd_engine.teachers import LocalTeacher, TeacherPool, TeacherSpec

WIDE, NARROW = 29, 20


class Strict(ToyBackend):
    """No row for an id at or above the vocabulary, none for a position at or above `max_positions`."""

    max_positions = None

    def logits(self, batch):
        assert batch.num_tokens == 0 or int(batch.tokens.max()) < self.vocab_size
        assert self.max_positions is None or max(batch.lengths(), default=0) <= self.max_positions
        return super().logits(batch)


def strict(vocab, seed, limit=None):
    backend = Strict(vocab, seed)
    backend.max_positions = limit
    return backend


def world(**fields):
    """The student writes ids that teacher "n" lacks: in the middle, first, last, twice, in a tool's answer; or none."""
    answers = [[1, 22, 3, 4], [25, 2, 3], [5, 6, 28], [7, 21, 8, 27, 9], [4, 24, 6, 7], [1, 2, 3]]
    masks = [[True] * len(answer) for answer in answers]
    masks[4][1] = False
    batch = pack_rollouts([[1, 2], [3], [4, 5, 6], [7], [8, 9], [10]], answers, response_masks=masks, **fields)
    pool = TeacherPool(
        [
            (TeacherSpec("n", weight=2.0), LocalTeacher(strict(NARROW, 5))),
            ("w", LocalTeacher(strict(WIDE, 6))),
        ]
    )
    return batch, strict(WIDE, 1), pool


def definition(batch, student, pool, config, names):
    """docs/math.md, "Vocabularies": a teacher says nothing after an id it lacks; there, the others are all there is."""
    log_q = student.module(batch).log_softmax(-1)
    log_p = {}
    for name in names:
        width = pool[name].vocab_size
        tokens = batch.tokens.where(batch.tokens < width, 3)  # any id: rows after it are left out below
        own = pool[name].backend.module(dataclasses.replace(batch, tokens=tokens)).detach().log_softmax(-1)
        log_p[name] = torch.nn.functional.pad(own, (0, WIDE - width), value=-torch.inf)
    bounds, count, total = batch.cu_seqlens.tolist(), int(batch.loss_mask.sum()), 0.0
    for start, end in pairwise(bounds):
        first = next(i for i in range(start, end) if batch.loss_mask[i])
        for i in range(start, end):
            if not batch.loss_mask[i]:
                continue
            read = [
                n for n in names if all(int(t) < pool[n].vocab_size for t in batch.tokens[first + 1 : i + 1].tolist())
            ]
            if not read:
                continue
            ids = log_q[i].detach().topk(config.k).indices.tolist()
            weights = torch.tensor([pool.spec(n).weight for n in read], dtype=torch.float64)
            buckets = [reference_buckets(log_p[n][i], ids).exp() for n in read]
            mixed = sum(w * b for w, b in zip(weights / weights.sum(), buckets)).log()
            own = reference_buckets(log_q[i], ids)
            total = total + oracles.divergence_of(own, mixed, config.divergence, 0.5, 0.1) / count
    return float(total.detach()), parameters_grad(total, student)


@pytest.mark.parametrize("mixture", ["route", "arithmetic"])
def test_rows_after_an_id_the_teacher_lacks_do_not_count_for_it(mixture):
    batch, student, pool = world(teacher_names=["n"] * 6 if mixture == "route" else [("n", "w")] * 6)
    config = OPDConfig(k=6, divergence="forward_kl", mixture=mixture)
    scored = score_rollouts(batch, student, pool, config)
    denominators = Denominators.of(batch, config)
    names = ["n"] if mixture == "route" else ["n", "w"]
    value, gradient = definition(batch, student, pool, config, names)
    for parts in ([batch], batch.micro_batches(max_seqs=2)):
        loss, grads, unread = 0.0, 0.0, 0
        for micro in parts:
            part, sums = distillation_loss(student.logits(micro), micro, scored, config, None, denominators)
            loss, grads = loss + part.item(), grads + parameters_grad(part, student)
            unread += sums.means()["unread_rows"]
        assert loss == pytest.approx(value, rel=1e-12)
        assert float((grads - gradient).abs().max()) < 1e-12 * float(gradient.abs().max())
        assert unread == (2 + 2 + 0 + 3 + 2 if mixture == "route" else 0)
    seen = row_divergences(LocalTeacher(student), batch, scored, config)
    assert int(seen.isnan().sum()) == batch.num_tokens - int(batch.loss_mask.sum()) + unread


def test_no_gradient_reaches_rows_that_no_teacher_reads_and_the_policy_still_does():
    batch, student, pool = world(
        teacher_names=["n"] * 6, advantages=[1.0] * 6, response_log_probs=[[-2.0] * n for n in (4, 3, 3, 5, 4, 3)]
    )
    gradients = []
    for coefficient in (0.0, 0.5):
        config = OPDConfig(k=6, divergence="forward_kl", policy_coefficient=coefficient)
        scored = score_rollouts(batch, student, pool, config)
        logits = student.logits(batch).detach().requires_grad_()
        distillation_loss(logits, batch, scored, config, None, Denominators.of(batch, config))[0].backward()
        gradients.append(logits.grad)
    unread = pool.route(batch)[0].eq(0) & batch.loss_mask
    assert int(unread.sum()) == 9
    assert bool((gradients[0][unread] == 0).all()) and not bool((gradients[1][unread] == 0).all())
    assert bool((gradients[0][batch.loss_mask & ~unread].abs().sum(1) > 0).all())


def test_the_loss_from_hidden_states_leaves_them_out():
    """The same loss and gradient as from logits; its head is the identity, so that hidden states are the logits."""
    batch, student, pool = world(teacher_names=["n"] * 6)
    config = OPDConfig(k=6, divergence="forward_kl")
    scored, denominators = score_rollouts(batch, student, pool, config), Denominators.of(batch, config)
    found = []
    for chunked in (False, True):
        logits = student.logits(batch).detach().requires_grad_()
        if chunked:
            rows = batch.loss_mask.nonzero().flatten()
            head = HiddenRows(logits[rows], torch.eye(WIDE).double(), None, VocabShard(0, WIDE, WIDE), 1000)
            exchange = RowsHere(rows, batch.num_tokens, logits.device)
            loss, metrics = micro_loss(batch, head, exchange, scored, config, denominators)
        else:
            loss, metrics = distillation_loss(logits, batch, scored, config, None, denominators)
        loss.backward()
        found.append((loss.item(), logits.grad, metrics.means()["unread_rows"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12) and found[0][2] == found[1][2] == 9
    assert torch.allclose(found[0][1], found[1][1], atol=1e-14)


def test_the_whole_vocabularys_divergence_leaves_them_out():
    batch, student, pool = world()
    ours = full_divergence(LocalTeacher(student), pool["n"], batch)
    assert ours.shape == (int(batch.loss_mask.sum()) - 9,) and bool(ours.isfinite().all())
    first = batch.select([5])
    log_p = pool["n"].backend.module(first)[:3].log_softmax(-1)
    log_q = student.module(first)[:3].log_softmax(-1)
    truth = (log_p.exp() * (log_p - log_q[:, :NARROW])).sum(-1)
    assert torch.allclose(ours[-3:], truth, atol=1e-12)


PROMPT = "teacher 'n': sample 7, position 1: wanted ids below its vocabulary of 20, got 23 in the prompt"


@pytest.mark.parametrize(
    "prompt, answer, teacher, student, message",
    [
        ([1, 23], [3], (NARROW, None), (WIDE, None), PROMPT),
        (
            [1, 2],
            [3, 23],
            (WIDE, None),
            (NARROW, None),
            "student: sample 7, position 3: .* of 20, got 23 in the answer",
        ),
        ([1, 23], [3], (WIDE, None), (NARROW, None), "student: sample 7, position 1: .* of 20, got 23 in the prompt"),
        ([1, 2, 3], [3, 4], (WIDE, 4), (WIDE, None), "teacher 'n': sample 7 has 5 tokens.* at most 4"),
        ([1, 2, 3], [3, 4], (WIDE, None), (WIDE, 4), "student: sample 7 has 5 tokens.* at most 4"),
    ],
)
def test_what_a_model_has_no_row_for_is_refused_before_any_model_runs(prompt, answer, teacher, student, message):
    batch = pack_rollouts([[1], prompt], [[2], answer], sample_ids=[3, 7])
    student, backend = strict(student[0], 1, student[1]), strict(teacher[0], 5, teacher[1])
    pool = TeacherPool({"n": LocalTeacher(backend)})
    with pytest.raises(ValueError, match=message):
        score_rollouts(batch, student, pool, OPDConfig(k=4))
    assert student.forward_rows == backend.forward_rows == []


def test_a_teacher_with_its_own_prompts_is_asked_about_those():
    fields = {"teacher_prompts": [torch.tensor([1, 2, 3]).tolist()], "sample_ids": [4]}
    pool = TeacherPool([(TeacherSpec("n", teacher_tokens=True), LocalTeacher(strict(NARROW, 5, 6)))])
    fits = pack_rollouts([[23, 24]], [[5, 6, 7]], **fields)  # the student's own prompt is nothing to this teacher
    score_rollouts(fits, strict(WIDE, 1), pool, OPDConfig(k=4))
    with pytest.raises(ValueError, match=r"teacher 'n': sample 4 has 7 tokens.* at most 6"):
        score_rollouts(pack_rollouts([[1]], [[5, 6, 7, 8]], **fields), strict(WIDE, 1), pool, OPDConfig(k=4))
    fields["teacher_prompts"] = [[1, 22]]
    with pytest.raises(ValueError, match=r"teacher 'n': sample 4, position 1: .* got 22 in the prompt"):
        score_rollouts(pack_rollouts([[1]], [[5]], **fields), strict(WIDE, 1), pool, OPDConfig(k=4))


def test_learned_positions_are_a_limit_and_computed_ones_are_not():
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from opd_engine.integrations.hf import generate, make_backend

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    rotary = {"intermediate_size": 16, "head_dim": 8, "max_position_embeddings": 8}
    opt = {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 9}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=12))
    for model, limit in (
        (gpt2, 12),
        (OPTForCausalLM(OPTConfig(**small, **opt)), 9),
        (Qwen3ForCausalLM(Qwen3Config(**small, num_key_value_heads=2, **rotary)), None),
    ):
        options = {"end_ids": [39], "pad_id": 0, "temperature": 0.0}
        assert LocalTeacher(make_backend(model.eval())).max_positions == limit
        generate(model, [[1, 2, 3]], max_new_tokens=5 if limit is None else limit - 3, **options)
        if limit is not None:
            with pytest.raises(ValueError, match=rf"prompts\[1\] has 4 tokens and {limit - 3} may follow; .* {limit}"):
                generate(model, [[1], [1, 2, 3, 4]], max_new_tokens=limit - 3, **options)
        with pytest.raises(ValueError, match=r"prompts\[1\]\[2\]: wanted ids below .* 40, got 40"):
            generate(model, [[1], [1, 2, 40]], max_new_tokens=1, **options)

"""The model of bytes behind docs/scaling.md: against the engine's own collectives, its cache and models; page in date.

What whole Megatron steps send is compared in python_tests/megatron_actor/test_scaling.py.
"""

import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import torch.distributed as dist

import opd_engine as opd
from opd_engine.distillation.cache import ScoreCache
from opd_engine.distillation.rollout import pack_rollouts
from opd_engine.integrations.megatron.gpt_shape import PUBLISHED, GPTShape, Rope
from opd_engine.parallel.collectives import count_collectives
from opd_engine.scaling.hardware import H100, step_times
from opd_engine.scaling.model import Layout, Pass, Traffic, held_bytes, parameters, step_traffic
from opd_engine.scaling.page import LAYOUTS, TOKENS, files, passes, times, wire
from ranks import ROOT, run_ranks

VOCAB, ROWS = 1536, 7
TINY = GPTShape("qwen3", VOCAB, 32, 2, 4, 2, 8, 64, 1e-6, Rope(1e4), True, 64)


def engine_collectives(ks: list[int]) -> list[dict[str, int]]:
    """Bytes by op, at each k, of a support pass, one teacher and an update, forward and backward."""
    rank, tp = dist.get_rank(), dist.get_world_size()
    width = VOCAB // tp
    shard = opd.VocabShard(rank * width, (rank + 1) * width, VOCAB, dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(ROWS, VOCAB, generator=generator)
    logits = whole[:, shard.vocab_start_index : shard.vocab_end_index].contiguous().requires_grad_()
    target = torch.randint(VOCAB, (ROWS,), generator=generator)
    found = []
    for k in ks:
        with count_collectives() as log:
            support = opd.topk_log_probs(logits, k, shard=shard)
            teacher = opd.gather_log_probs(logits.detach() * 2, support.indices, target=target, shard=shard)
            student = opd.gather_log_probs(logits, support.indices, shard=shard)
            opd.distill_loss(student, teacher).sum().backward()
        found.append({op: log.nbytes(op) for op in ("all_gather", "all_reduce", "reduce_scatter", "broadcast")})
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("tp", [2, 3])
def test_the_engines_collectives_have_the_models_bytes(tp):
    ks = [1, 8, 64, 256, 1024]
    step = [Pass(TINY, ROWS, ROWS, kind) for kind in ("topk", "score", "update")]
    for found in run_ranks(__file__, "engine_collectives", tp, ks=ks):
        for k, measured in zip(ks, found, strict=True):
            told = [t for t in step_traffic(step, Layout(tp=tp), k=k) if t.whose == "engine"]
            for op, nbytes in measured.items():
                assert nbytes == sum(traffic.nbytes for traffic in told if traffic.op == op), (k, op)


@pytest.mark.parametrize("scored_by", [1, 2, 3])
@pytest.mark.parametrize("k", [8, 64, 1024])
def test_the_cache_holds_the_models_bytes(k, scored_by):
    batch = pack_rollouts([[1, 2]] * 3, [[3] * 5, [4], [5, 6]], teacher_names=[""] * 3)
    logits = torch.randn(batch.num_tokens, 1100)
    support = opd.topk_log_probs(logits, k)
    cache = ScoreCache()
    cache.put_support(batch, support.indices)
    for number in range(scored_by):
        scores = opd.gather_log_probs(logits + number, support.indices, target=batch.next_tokens())
        cache.put_scores(f"teacher {number}", batch, scores)
    assert cache.nbytes == int(batch.loss_mask.sum()) * held_bytes(k, scored_by)


def test_parameters_are_those_of_the_models():
    transformers = pytest.importorskip("transformers")
    for tied in (True, False):
        shape = GPTShape("qwen3", 512, 48, 3, 6, 2, 8, 96, 1e-6, Rope(1e4), tied, 64)
        config = transformers.Qwen3Config(
            vocab_size=512,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=96,
            tie_word_embeddings=tied,
        )
        model = transformers.Qwen3ForCausalLM(config)
        assert parameters(shape) == sum(p.numel() for p in model.parameters())
    assert parameters(PUBLISHED["qwen3-8b"]) == 8_190_735_360
    # Over stages and ranks nothing is lost: what is split adds up, norms are held by every rank.
    shape, layout = PUBLISHED["qwen3-32b"], Layout(tp=4, pp=8)
    stages = sum(parameters(shape, layout, stage) for stage in range(8))
    replicated = shape.num_layers * (2 * shape.hidden_size + 2 * shape.head_dim) + shape.hidden_size
    assert 4 * stages == parameters(shape) + 3 * replicated


def test_a_rings_share_of_each_collective():
    def sent(op: str, group: int = 4) -> float:
        return Traffic("tp", "engine", "", op, 100.0, group).wire

    assert [sent(op) for op in ("all_gather", "reduce_scatter", "all_reduce", "send")] == [75.0, 75.0, 150.0, 100.0]
    assert [sent(op, 1) for op in ("all_gather", "all_reduce", "send")] == [0.0, 0.0, 0.0]


def test_one_rank_sends_nothing_and_the_stages_without_scores_none_of_the_engines():
    assert step_traffic(passes(Layout()), Layout(), k=64) == []
    layout = Layout(tp=2, pp=4)
    for stage in range(4):
        found = step_traffic(passes(layout), layout, k=64, stage=stage)
        assert any(t.whose == "engine" for t in found) == (stage == 3)
        assert any(t.over == "pp" for t in found)
    scored = wire(Layout(tp=8), whose="engine", teachers=3) - wire(Layout(tp=8), whose="engine", teachers=2)
    assert scored == pytest.approx(wire(Layout(tp=8), whose="engine", teachers=2) - wire(Layout(tp=8), whose="engine"))


def test_times_are_bytes_over_the_data_sheet_and_the_largest_is_named():
    layout = Layout(tp=8, dp=1024)
    found = step_times(passes(layout), layout, H100, k=64, scored_by=1, switched=0)
    sent = wire(layout, whose="framework", over="dp") * TOKENS / layout.dp
    assert found.network == pytest.approx(sent / 50e9, rel=1e-3)
    assert found.next_bottleneck() == ("network", pytest.approx(found.network / found.products))
    for layout in LAYOUTS:
        found = times(layout)
        assert found.next_bottleneck()[0] == max(list(found.named())[1:], key=found.named().get)
    split = step_times(passes(Layout(tp=8, cp=2)), Layout(tp=8, cp=2), H100, k=64, scored_by=1, switched=0)
    assert split.network > 0, "sixteen ranks do not fit in one node"


def test_the_page_and_its_plots_are_in_date():
    for path, content in files(ROOT).items():
        assert path.read_text(encoding="utf-8") == content, f"{path.name}: run python -m opd_engine.scaling"


def test_the_page_covers_what_it_promises():
    page = (ROOT / "docs" / "scaling.md").read_text()
    tables = {m[1]: m[0] for m in re.finditer(r"^\| (\w+) \|.*?(?=\n\n)", page, re.M | re.S)}
    firsts = {corner: re.findall(r"^\| ([\d,]+) \|", text, re.M) for corner, text in tables.items()}
    assert firsts["k"] == ["8", "16", "32", "64", "128", "256", "512", "1,024"]
    assert firsts["PP"] == ["1", "2", "4", "8"] and firsts["teachers"] == ["1", "2", "4", "8", "16"]
    assert firsts["DP"][0] == "1" and firsts["DP"][-1] == "1,024"
    assert all(f"{axis} {n}" in page for axis in ("TP", "CP") for n in (2, 4, 8))
    assert "predictions, never measured" in page
    for name in re.findall(r"\((assets/\w+\.svg)\)", page):
        ElementTree.fromstring((ROOT / "docs" / name).read_text())

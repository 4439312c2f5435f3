"""Where a run's numbers go, what its phases cost, and rollouts that do not depend on how they are split."""

import sys
import time
import types

import pytest
import torch

from opd_engine.distillation.phases import NAMES, Phases
from opd_engine.integrations.megatron.rollout import generate
from opd_engine.train.journal import Journal, read_metrics


def test_wandb_gets_the_same_numbers_where_it_is_asked_for(tmp_path, monkeypatch):
    calls = []
    stand_in = types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )
    stand_in.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    journal = Journal(tmp_path / "run", wandb_project="distil")
    journal.record(3, "train", {"loss": 0.5, "divergence/math": 2.0})
    journal.close()
    assert calls[0]["project"] == "distil" and calls[0]["name"] == "run"
    assert calls[1:] == [(3, {"train/loss": 0.5, "train/divergence/math": 2.0}), "finished"]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [
        {"step": 3, "kind": "train", "loss": 0.5, "divergence/math": 2.0}
    ]
    calls.clear()
    Journal(tmp_path / "plain").close()
    assert calls == []


def test_wandb_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"run\.wandb_project: 'distil' needs the package wandb"):
        Journal(tmp_path / "run", wandb_project="distil")
    assert not (tmp_path / "run").exists()


def test_phases_add_up_and_the_slowest_rank_counts():
    phases = Phases()
    with phases.phase("rollout"):
        time.sleep(0.02)
    for _ in range(2):
        with pytest.raises(KeyError), phases.phase("update"):
            time.sleep(0.01)
            raise KeyError
    found = phases.measured(600)
    assert set(found) == {"seconds/rollout", "seconds/update", "tokens_per_second", "peak_memory_bytes"}
    assert found["seconds/rollout"] >= 0.02 and found["seconds/update"] >= 0.02
    total = found["seconds/rollout"] + found["seconds/update"]
    assert found["tokens_per_second"] == pytest.approx(600 / total) and found["peak_memory_bytes"] > 1e7
    slower = phases.measured(600, lambda values: values * 2)
    assert slower["seconds/rollout"] == pytest.approx(2 * found["seconds/rollout"])
    assert slower["tokens_per_second"] == pytest.approx(found["tokens_per_second"] / 2)
    with pytest.raises(ValueError, match=f"name: wanted one of {', '.join(NAMES)}"), phases.phase("lunch"):
        pass


class Table:
    """A scorer whose next token depends on the last token alone."""

    def __init__(self):
        self.logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(2)) * 2

    def next_token_logits(self, batch):
        return self.logits[batch.tokens[batch.cu_seqlens[1:].long() - 1]]


def test_completions_are_drawn_from_the_models_distribution_whatever_else_is_in_the_batch():
    scorer, count = Table(), 4000
    uniforms = torch.rand(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prompts = [[number % 6] for number in range(count)]
    written = generate(
        scorer, prompts, max_new_tokens=3, end_ids=(5,), temperature=0.7, uniforms=uniforms, top_logprobs=2
    )
    tokens, tops = written.tokens, written.top_logprobs
    log_q = (scorer.logits.double() / 0.7).log_softmax(1)
    drawn, seen = torch.zeros(6, 6, dtype=torch.float64), []
    for prompt, ids, log_prob, done in zip(prompts, tokens, written.log_probs, written.finished):
        assert done == (ids[-1] == 5) and 5 not in ids[:-1] and (done or len(ids) == 3)
        before = prompt + ids
        assert log_prob == pytest.approx([log_q[a, b].item() for a, b in zip(before, ids)])
        for row, top in zip(before, tops[len(seen)]):
            values, likeliest = log_q[row].topk(2)
            assert [token for _, token in top] == likeliest.tolist()
            assert [value for value, _ in top] == pytest.approx(values.tolist())
        seen.append(len(tops[len(seen)]) == len(ids))
        drawn[prompt[0], ids[0]] += 1
    assert all(seen) and len(seen) == count
    frequencies = drawn / drawn.sum(1, keepdim=True)
    assert float((frequencies - log_q.exp()).abs().max()) < 0.05
    half = list(range(1, count, 2))
    again = generate(
        scorer,
        [prompts[index] for index in half],
        max_new_tokens=3,
        end_ids=(5,),
        temperature=0.7,
        uniforms=uniforms[half],
    )
    assert again.tokens == [tokens[index] for index in half]
    greedy = generate(scorer, prompts[:6], max_new_tokens=1, end_ids=(), temperature=0.0).tokens
    assert greedy == [[int(row.argmax())] for row in scorer.logits]
    for options, words in (({"temperature": -1.0}, "temperature: wanted"), ({"temperature": 1.0}, "uniforms: wanted")):
        with pytest.raises(ValueError, match=words):
            generate(scorer, prompts, max_new_tokens=2, end_ids=(), **options)

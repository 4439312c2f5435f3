"""Rollouts: the KV cache, the padding and the sampler change nothing of the distribution that is sampled."""

import pytest
import torch

from opd_engine.integrations.hf.rollout import generate
from tiny_models import wide_qwen3

PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]
SETTINGS = {"max_new_tokens": 6, "end_ids": [13], "pad_id": 14}


def no_cache_log_probs(model, prompt, completion, temperature=1.0, shift=0):
    """log q of each generated id from one plain forward over the unpadded sequence."""
    token_ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=token_ids, use_cache=False).logits[0].double() / temperature
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1) - shift
    return torch.log_softmax(logits, -1)[rows, torch.tensor(completion)].tolist()


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_with_cache_and_padding_equal_a_plain_forward(temperature):
    model = wide_qwen3()
    generator = torch.Generator().manual_seed(0)
    written = generate(model, PROMPTS * 4, temperature=temperature, generator=generator, **SETTINGS)
    ours, plain, shifted = [], [], []
    for prompt, tokens, log_probs in zip(PROMPTS * 4, written.tokens, written.log_probs, strict=True):
        ours += log_probs
        plain += no_cache_log_probs(model, prompt, tokens, temperature)
        if len(prompt) > 1:
            shifted += no_cache_log_probs(model, prompt, tokens, temperature, shift=1)
    assert max(abs(a - b) for a, b in zip(ours, plain, strict=True)) < 2e-5
    assert min(plain) < -3.0, "a flat model shows nothing"
    # Control: the row before predicts another token, and this comparison sees it.
    longer = [v for p, row in zip(PROMPTS * 4, written.log_probs, strict=True) if len(p) > 1 for v in row]
    assert max(abs(a - b) for a, b in zip(longer, shifted, strict=True)) > 1.0


def test_greedy_does_not_depend_on_the_company_a_prompt_keeps():
    model = wide_qwen3()
    together = generate(model, PROMPTS, temperature=0.0, **SETTINGS)
    alone = [generate(model, [prompt], temperature=0.0, **SETTINGS).tokens[0] for prompt in PROMPTS]
    assert together.tokens == alone


def test_a_sequence_stops_at_its_end_token_and_at_the_limit():
    model = wide_qwen3()
    greedy = generate(model, PROMPTS, temperature=0.0, max_new_tokens=6, end_ids=[], pad_id=14)
    end = greedy.tokens[0][2]
    stopped = generate(model, PROMPTS, temperature=0.0, max_new_tokens=6, end_ids=[end], pad_id=14)
    for before, after, finished in zip(greedy.tokens, stopped.tokens, stopped.finished, strict=True):
        cut = before.index(end) + 1 if end in before else 6
        assert after == before[:cut] and finished == (end in before)
    assert [len(row) for row in stopped.log_probs] == [len(row) for row in stopped.tokens]


def test_the_generator_decides_the_samples():
    model = wide_qwen3()

    def sampled(seed):
        return generate(model, PROMPTS, generator=torch.Generator().manual_seed(seed), **SETTINGS).tokens

    assert sampled(1) == sampled(1) != sampled(2)


@torch.no_grad()
def test_samples_follow_the_models_distribution():
    model = wide_qwen3()
    count = 4000
    settings = SETTINGS | {"max_new_tokens": 1}
    written = generate(model, [[3, 4]] * count, generator=torch.Generator().manual_seed(0), **settings)
    observed = torch.bincount(torch.tensor([row[0] for row in written.tokens]), minlength=32).double() / count
    expected = torch.softmax(model(input_ids=torch.tensor([[3, 4]])).logits[0, -1].double(), -1)
    error = (observed - expected).abs() / (expected * (1 - expected) / count).sqrt().clamp(min=1 / count)
    assert float(error.max()) < 4.5
    # Control: the distribution of another position is told apart.
    other = torch.softmax(model(input_ids=torch.tensor([[3, 4]])).logits[0, 0].double(), -1)
    assert float((observed - other).abs().max()) > 0.05


@torch.no_grad()
def test_top_k_and_top_p_cut_only_when_asked():
    model = wide_qwen3()
    probs = torch.softmax(model(input_ids=torch.tensor([[3, 4]])).logits[0, -1], -1)
    order = probs.argsort(descending=True).tolist()
    settings = SETTINGS | {"max_new_tokens": 1}

    def drawn(**cut):
        written = generate(model, [[3, 4]] * 600, generator=torch.Generator().manual_seed(0), **cut, **settings)
        return {row[0] for row in written.tokens}

    assert drawn(top_k=2) == set(order[:2])
    mass = float(probs[order[0]] + probs[order[1]] / 2)
    assert drawn(top_p=mass) == set(order[:2])
    assert len(drawn()) > 2


def test_the_model_is_left_as_it_was():
    model = wide_qwen3().train()
    generate(model, PROMPTS, generator=torch.Generator(), **SETTINGS)
    assert model.training


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": [[1], []]}, "prompts: wanted at least one token each, got an empty prompt at index 1"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_a_wrong_setting_is_named(change, words):
    arguments = {"prompts": PROMPTS} | SETTINGS | change
    with pytest.raises(ValueError, match=words):
        generate(wide_qwen3(), **arguments)


def test_no_prompts_give_no_completions():
    assert generate(wide_qwen3(), [], **SETTINGS).tokens == []


@torch.no_grad()
def test_the_likeliest_ids_come_with_each_token():
    """Before top_k and top_p, at the sampling temperature, in the order of their log-probs."""
    model = wide_qwen3()
    sampling = {"temperature": 0.8, "top_k": 2, "generator": torch.Generator().manual_seed(1)}
    written = generate(model, PROMPTS, top_logprobs=3, **sampling, **SETTINGS)
    for prompt, completion, tops in zip(PROMPTS, written.tokens, written.top_logprobs, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0].double() / 0.8
        truth = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].topk(3)
        assert [[token for _, token in top] for top in tops] == truth.indices.tolist()
        found = torch.tensor([[value for value, _ in top] for top in tops], dtype=torch.float64)
        assert float((found - truth.values).abs().max()) < 1e-4
    assert generate(model, PROMPTS, **SETTINGS).top_logprobs is None

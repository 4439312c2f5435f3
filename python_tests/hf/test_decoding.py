"""Rollouts and logits of a family of each kind of memory are the model's own; ways are chosen by what they give."""

import inspect

import pytest
import torch
import transformers
from transformers import Qwen3ForCausalLM

from causal_fidelity import logits_off, rollout_gap
from opd_engine.integrations.hf import generate
from opd_engine.integrations.hf.decoding import Way, find_way
from opd_engine.integrations.hf.models import max_positions
from tiny_causal_models import VOCAB, tiny_model

PADDED, APART = Way(padded=True, cached=True), Way(padded=False, cached=True)
FAMILIES = {
    "GPT2LMHeadModel": PADDED,  # learned positions
    "BloomForCausalLM": PADDED,  # slopes instead of positions
    "MistralForCausalLM": PADDED,  # a window of 6
    "GptOssForCausalLM": PADDED,  # windows in turn, sinks, experts
    "Gemma2ForCausalLM": PADDED,  # soft-caps
    "CohereForCausalLM": PADDED,  # a scale of the logits
    "DeepseekV3ForCausalLM": PADDED,  # latent attention
    "DeepseekV4ForCausalLM": APART,  # compressed blocks, which padding would shift
    "BartForCausalLM": APART,  # positions from the cache's length
    "RobertaForCausalLM": APART,  # positions that begin after the padding's
    "MambaForCausalLM": APART,  # recurrent states under another name
    "Mamba2ForCausalLM": PADDED,  # states that leave out what is masked
    "JambaForCausalLM": PADDED,  # both
    "RwkvForCausalLM": APART,  # a state that is called so
    "RecurrentGemmaForCausalLM": Way(padded=False, cached=False),  # a state inside the module
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_of_memory_rolls_out_as_one_plain_forward(family):
    model = tiny_model(getattr(transformers, family))
    assert find_way(model) == FAMILIES[family]
    assert rollout_gap(model) < 1e-4
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = tiny_model(type(model)).to(dtype)
        assert find_way(model) == FAMILIES[family], dtype  # half precision must not hide what padding does
        assert max(logits_off(model)) <= 8, dtype


class Forgetful(Qwen3ForCausalLM):
    """Forgets its cache now and then: from a step on, or past a length."""

    forgets_from = 0

    def forward(self, input_ids, *, cache=None, past_key_values=None, **options):
        name = "cache" if "cache" in inspect.signature(Qwen3ForCausalLM.forward).parameters else "past_key_values"
        memory = cache if name == "cache" else past_key_values
        if memory is not None and memory.get_seq_length() >= self.forgets_from:
            memory = transformers.DynamicCache(config=self.config)
        return super().forward(input_ids=input_ids, **{name: memory}, **options)


@pytest.mark.filterwarnings("ignore:Forgetful")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("forgets_from", [1, 30])
def test_a_cache_that_is_lost_is_seen_in_every_dtype(forgets_from, dtype):
    model = tiny_model(Forgetful).to(dtype)
    model.forgets_from, model.config.sliding_window = forgets_from, 24  # tried past its window
    with pytest.warns(UserWarning, match="Forgetful does not give the same logits with its cache as without"):
        assert find_way(model) == Way(padded=False, cached=False)
    assert rollout_gap(model.float()) < 1e-4


def test_a_model_that_looks_ahead_is_refused_by_name():
    model = tiny_model(transformers.XLNetLMHeadModel)
    with pytest.raises(ValueError, match="rollouts: XLNetLMHeadModel gives other logits, when a sequence is continued"):
        generate(model, [[1, 2, 3]], max_new_tokens=2, end_ids=[VOCAB], pad_id=0)


def test_a_model_of_several_tables_is_refused_by_name():
    model = tiny_model(transformers.MusicgenForCausalLM)
    with pytest.raises(ValueError, match="rollouts: MusicgenForCausalLM reads ModuleList, wanted one table"):
        generate(model, [[1, 2, 3]], max_new_tokens=2, end_ids=[VOCAB], pad_id=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "limit"),
    [
        *(("GPT2LMHeadModel", 128), ("BartForCausalLM", 128), ("RobertaForCausalLM", 127), ("GPTJForCausalLM", 128)),
        *(("CTRLLMHeadModel", 128), ("MptForCausalLM", 128), ("LlamaForCausalLM", None), ("BloomForCausalLM", None)),
    ],
)
def test_the_longest_sequence_is_the_one_that_the_model_can_read(family, limit):
    model = tiny_model(getattr(transformers, family))
    assert max_positions(model) == limit
    model(input_ids=torch.full((1, limit or 160), 5), use_cache=False)
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5), use_cache=False)


def test_no_warning_is_given_at_the_start(caplog):
    model = tiny_model(transformers.Qwen3ForCausalLM)
    transformers.logging.set_verbosity_warning()
    try:
        transformers.logging.enable_propagation()
        with caplog.at_level("WARNING"):
            generate(model, [[1, 2, 3], [4]], max_new_tokens=2, end_ids=[VOCAB], pad_id=0)
    finally:
        transformers.logging.disable_propagation()
    assert caplog.text == ""

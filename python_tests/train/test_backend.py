"""The transformers backend: packed logits are each sequence's own; a sharded head gives the one-process gradient."""

import json

import pytest
import torch

from opd_engine.distillation.rollout import pack_rollouts
from opd_engine.integrations.hf import load_model, load_tokenizer, make_backend
from opd_engine.integrations.hf.backend import even_shard
from opd_engine.parallel.vocab import VocabShard
from opd_engine.teachers.protocols import ModelBackend, ProjectingBackend
from opd_engine.train.examples.arithmetic import make_tokenizer
from ranks import run_ranks
from tiny_models import wide_qwen3, write_model

SEQUENCES = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11]]


def batch():
    return pack_rollouts([row[:1] for row in SEQUENCES], [row[1:] for row in SEQUENCES])


@torch.no_grad()
def test_packed_logits_are_those_of_each_sequence_alone():
    model = wide_qwen3()
    backend = make_backend(model, make_tokenizer())
    assert isinstance(backend, ProjectingBackend) and isinstance(backend, ModelBackend)
    packed = backend.logits(batch()).split([len(row) for row in SEQUENCES])
    for row, logits in zip(SEQUENCES, packed, strict=True):
        alone = model(input_ids=torch.tensor([row])).logits[0]
        assert float((logits - alone).abs().max()) < 1e-4
        assert float(alone.std()) > 0.5, "a flat model shows nothing"
    projected = backend.project(backend.hidden(batch()))
    assert torch.equal(projected, backend.logits(batch()))


def head_gradients(rank_shard: VocabShard | None, seed: int) -> dict[str, torch.Tensor]:
    """Gradients of a fixed function of the logits; each rank adds up its own columns."""
    model = wide_qwen3(vocab_size=30, seed=seed).double()
    logits = make_backend(model, shard=rank_shard).logits(batch())
    weights = torch.randn(logits.shape[0], 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    columns = slice(0, 30) if rank_shard is None else slice(rank_shard.vocab_start_index, rank_shard.vocab_end_index)
    (logits.tanh() * weights[:, columns]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def compare_sharded_gradients() -> dict[str, float]:
    """In each rank: every parameter's worst difference from one process, the tied embedding included."""
    from torch.distributed import group

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole = head_gradients(None, 1)
    sharded = head_gradients(even_shard(30, group.WORLD, size, rank), 1)
    return {name: float((whole[name] - sharded[name]).abs().max() / whole[name].abs().max()) for name in whole}


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_sharded_tied_head_gives_every_rank_the_one_process_gradient(world_size):
    # 30 columns over 4 ranks: 8, 8, 8, 6.
    for errors in run_ranks(__file__, "compare_sharded_gradients", world_size):
        assert "model.embed_tokens.weight" in errors and len(errors) > 10
        assert max(errors.values()) < 1e-12, errors


def test_a_gradient_that_is_not_summed_over_ranks_would_be_seen():
    half = {name: grad.clone() for name, grad in head_gradients(None, 1).items()}
    whole = head_gradients(None, 1)
    half["model.embed_tokens.weight"][15:] *= 0.99
    errors = {name: float((whole[name] - half[name]).abs().max() / whole[name].abs().max()) for name in whole}
    assert max(errors.values()) > 1e-3


def test_shares_of_the_vocabulary_tile_it():
    assert even_shard(30, None, 1, 0) is None

    class Group:
        def __init__(self, rank):
            self._rank = rank

        def size(self):
            return 4

        def rank(self):
            return self._rank

    shards = [even_shard(30, Group(rank), 4, rank) for rank in range(4)]
    bounds = [(shard.vocab_start_index, shard.vocab_end_index) for shard in shards]
    assert bounds == [(0, 8), (8, 16), (16, 24), (24, 30)]


def test_token_maps_are_the_tokenizers_and_equal_ones_become_one_object(tmp_path):
    tokenizer = make_tokenizer()
    first, second = make_backend(wide_qwen3(), tokenizer), make_backend(wide_qwen3(), make_tokenizer())
    assert first.token_to_id() == tokenizer.get_vocab() and first.token_to_id() is not second.token_to_id()
    second.share_token_map(first)
    assert first.token_to_id() is second.token_to_id()
    assert make_backend(wide_qwen3()).token_to_id() is None


def test_folders_that_hold_no_model_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"--student: wanted a directory .* got '/nowhere'"):
        load_model("/nowhere", argument="--student")
    with pytest.raises(ValueError, match=r"config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(ValueError, match=r"wanted model\.safetensors"):
        load_model(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(ValueError, match="cannot load a causal LM"):
        load_model(tmp_path / "model")


def test_weights_that_are_missing_or_cut_short_are_named_and_never_invented(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_model(tmp_path / "model")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"--teacher math: .*model\.safetensors"):
        load_model(folder, argument="--teacher math")
    file.write_bytes(whole)
    weights = load_file(file)
    assert "lm_head.weight" not in weights, "a tied head is not missing"
    load_model(folder)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"--student: 1 weights of Qwen3ForCausalLM .*: model\.norm\.weight"):
        load_model(folder, argument="--student")


def test_pickled_weights_are_refused(tmp_path):
    folder = write_model(tmp_path / "model")
    model = load_model(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"wanted model\.safetensors or .* got neither"):
        load_model(folder)
    assert load_tokenizer(folder).eos_token == ";"

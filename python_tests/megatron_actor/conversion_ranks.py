"""In four ranks: Hugging Face folders and converted checkpoints give transformers' logits at every layout; mistakes do
not. What Megatron loaded it saves again, for the way back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

import gpt_folders
from megatron_actor import on_cpu

LAYOUTS = {"tp2 pp2": (2, 2), "tp4": (4, 1), "pp4": (1, 4), "tp2 dp2": (2, 1)}
SAVED = ("tp2 pp2", "tp4", "pp4")


def everything(folder: str) -> dict[str, dict[str, float]]:
    """{layout and model: {what was loaded, or which mistake was planted: error relative to the largest logit}}."""
    warnings.filterwarnings("ignore")
    from megatron.core.models.gpt import gpt_layer_specs, gpt_model  # noqa: F401

    from opd_engine.integrations.megatron.training import start_megatron, stop_megatron

    on_cpu.install()
    root = Path(folder)
    found: dict[str, dict[str, float]] = {}
    for layout, (tp, pp) in LAYOUTS.items():
        groups = start_megatron(tp, pp)
        for name in gpt_folders.MODELS:
            place = root / name
            wanted = torch.load(place / "logits.pt", weights_only=True)
            here = found[f"{layout}, {name}"] = {}
            here["folder"] = error(place / "hf", place / "hf", groups, wanted)
            saved = place / f"saved {layout}" if layout in SAVED else None
            here["checkpoint"] = error(place / "hf", place / "megatron", groups, wanted, save_as=saved)
            if layout == "tp2 pp2":
                here |= mistakes(name, place / "hf", groups, wanted)
        stop_megatron()
    return found


def error(hf: Path, weights: Path, groups, wanted: torch.Tensor, *, save_as: Path | None = None, **changes) -> float:
    """changes: of the shape that the model is built with."""
    from opd_engine.distillation.rollout import pack_rollouts
    from opd_engine.integrations.megatron import BatchLayout, MegatronScorer
    from opd_engine.integrations.megatron.gpt import build_gpt
    from opd_engine.integrations.megatron.gpt_shape import GPTShape
    from opd_engine.integrations.megatron.loading import load_module, save_weights

    shape = dataclasses.replace(GPTShape.read(hf, argument="model"), **changes)
    module = build_gpt(shape, groups)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    load_module(module, weights, groups, argument="model")
    if save_as is not None:
        save_weights(module, save_as)
    ids = gpt_folders.tokens().tolist()
    batch = pack_rollouts([ids[:end] for end in range(1, len(ids) + 1)], [[] for _ in ids])
    layout = BatchLayout(packed=False, max_tokens=4096)
    scorer = MegatronScorer(module, vocab_size=shape.vocab_size, groups=groups, layout=layout)
    return float((scorer.next_token_logits(batch).float() - wanted).abs().max() / wanted.abs().max())


def mistakes(name: str, hf: Path, groups, wanted: torch.Tensor) -> dict[str, float]:
    from opd_engine.integrations.megatron.gpt_shape import GPTShape

    rope = GPTShape.read(hf, argument="model").rope
    found = {}
    for what in (keys_before_queries, keys_for_values, queries_then_keys, up_before_gate, halves_of_other_ranks):
        with planted("fill", what):
            found[what.__name__] = error(hf, hf, groups, wanted)
    with planted("sources", every_stage_from_the_first_layer):
        found["every_stage_from_the_first_layer"] = error(hf, hf, groups, wanted)
    found["rope_theta_off_by_a_tenth"] = error(
        hf, hf, groups, wanted, rope=dataclasses.replace(rope, theta=rope.theta * 1.1)
    )
    if rope.kind != "default":
        plain = dataclasses.replace(rope, kind="default", settings=())
        found["rope_scaling_forgotten"] = error(hf, hf, groups, wanted, rope=plain)
    if name.startswith("qwen3"):
        with planted("sources", qk_norms_left_at_one):
            found["qk_norms_left_at_one"] = error(hf, hf, groups, wanted)
    return found


@contextlib.contextmanager
def planted(name: str, mistake) -> Iterator[None]:
    """The mistake in the place of one of the loader's functions; it is given the right one first."""
    from opd_engine.integrations.megatron import loading

    right = getattr(loading, name)
    setattr(loading, name, lambda *arguments: mistake(right, *arguments))
    try:
        yield
    finally:
        setattr(loading, name, right)


def keys_before_queries(fill, buffer, parts, how, shape, tp_rank, tp_size):
    fill(buffer, parts, how, shape, tp_rank, tp_size)
    if how == "qkv":
        rows = grouped(buffer, shape)
        rows.copy_(torch.cat([rows[:, -2 * shape.head_dim : -shape.head_dim], rows[:, : -2 * shape.head_dim],
                              rows[:, -shape.head_dim :]], dim=1))  # fmt: skip


def keys_for_values(fill, buffer, parts, how, shape, tp_rank, tp_size):
    fill(buffer, [parts[0], parts[2], parts[1]] if how == "qkv" else parts, how, shape, tp_rank, tp_size)


def queries_then_keys(fill, buffer, parts, how, shape, tp_rank, tp_size):
    """All queries of the rank, then all keys, then all values, as if there were no groups."""
    fill(buffer, parts, how, shape, tp_rank, tp_size)
    if how == "qkv":
        rows, d = grouped(buffer, shape), shape.head_dim
        apart = [rows[:, : -2 * d], rows[:, -2 * d : -d], rows[:, -d:]]
        buffer.copy_(torch.cat([part.reshape(-1, buffer.shape[1]) for part in apart]))


def up_before_gate(fill, buffer, parts, how, shape, tp_rank, tp_size):
    fill(buffer, parts[::-1] if how == "gate" else parts, how, shape, tp_rank, tp_size)


def halves_of_other_ranks(fill, buffer, parts, how, shape, tp_rank, tp_size):
    """The gate's and the other half's rows cut as one tensor's."""
    fill(buffer, parts, how, shape, tp_rank, tp_size)
    if how == "gate":
        whole = torch.cat([part[:] for part in parts])
        buffer.copy_(whole.chunk(tp_size)[tp_rank])


def every_stage_from_the_first_layer(sources, module, shape):
    first = min(layer.layer_number for layer in module.decoder.layers) - 1
    for name, piece in sources(module, shape):
        if piece.layer is not None:
            old, new = f".layers.{piece.layer}.", f".layers.{piece.layer - first}."
            piece = dataclasses.replace(piece, sources=tuple(part.replace(old, new) for part in piece.sources))
        yield name, piece


def qk_norms_left_at_one(sources, module, shape):
    for name, parameter in module.named_parameters():
        if "q_layernorm" in name or "k_layernorm" in name:
            torch.nn.init.ones_(parameter)
    yield from (
        (name, piece) for name, piece in sources(module, shape) if "q_layernorm" not in name and "k_layer" not in name
    )


def grouped(qkv: torch.Tensor, shape) -> torch.Tensor:
    return qkv.view(-1, (shape.num_heads // shape.num_query_groups + 2) * shape.head_dim, qkv.shape[1])

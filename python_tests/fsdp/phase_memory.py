"""Resident memory of one process, sampled while each model runs: two teachers and a student in turns, or all there."""

from __future__ import annotations

import json
import os
import sys

import torch

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def big(seed: int):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Qwen3Config(vocab_size=512, num_key_value_heads=2, head_dim=64, max_position_embeddings=64, **sizes)
    return Qwen3ForCausalLM(config).eval()


def main(two_phase: bool) -> dict:
    from fsdp.steps import batch_of_step, make_actor
    from opd_engine.teachers import TeacherPool

    torch.set_num_threads(1)
    start, seen = resident(), {"student": [], "teacher": []}
    model = big(0)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    actor = make_actor(model, two_phase=two_phase)
    teachers = {}
    for name, seed in (("a", 1), ("b", 2)):
        teacher = big(seed)
        teacher.register_forward_hook(lambda *_: seen["teacher"].append(resident()))
        teacher.model.register_forward_hook(lambda *_: seen["teacher"].append(resident()))
        teachers[name] = actor.teacher(teacher)
    model.model.register_forward_hook(lambda *_: seen["student"].append(resident()))
    for step in range(2):
        batch = batch_of_step(step)
        scored = actor.score_rollouts(batch, TeacherPool(teachers))
        if step == 1:
            seen["student"].clear()
        actor.train_step(batch, scored)
        if step == 0:
            seen["teacher"].clear()
    return {"weights": weights} | {name: max(values) - start for name, values in seen.items()}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1] == "two_phase")))

"""What a model costs in a process of its own: bytes of resident memory a parameter, before and after, in bf16."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import warnings
from collections import defaultdict

import psutil
import torch

from megatron_actor import models, on_cpu
from megatron_actor.dense import Shape
from opd_engine.parallel.launch import join_world


def resident() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back, so that it is not counted
    return psutil.Process().memory_info().rss


def main(kind: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_layer_specs, gpt_model  # noqa: F401
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from opd_engine.distillation import pack_rollouts
    from opd_engine.integrations.megatron import BatchLayout, MegatronGroups, MegatronScorer
    from opd_engine.integrations.megatron.teachers import own_teacher

    on_cpu.install()
    with join_world("cpu", group_when_alone=True):
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        groups = MegatronGroups.from_parallel_state()
        small, large = (
            Shape(hidden=hidden, layers=4, heads=8, groups=8, ffn=4 * hidden, vocab_size=250, padded_vocab_size=256)
            for hidden in (32, 1152)
        )
        batch = pack_rollouts([[1, 2, 3]], [[4, 5, 6, 7]])

        def used(shape: Shape):
            """Build, load, score once; with a trainer around it where that is asked for."""
            options = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}
            nothing = defaultdict(lambda: torch.zeros(()))
            model = models.build(shape, nothing, groups, context=None, **options)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(std=0.1)
            layout = BatchLayout(packed=False)
            if kind == "teacher":
                kept = own_teacher(model, "cpu", vocab_size=shape.vocab_size, layout=layout)
                kept.topk(batch, 4)
                return kept, model
            ddp = models.data_parallel(model)
            options = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16)
            optimizer = get_megatron_optimizer(options, [ddp])
            for parameter in model.parameters():
                parameter.main_grad.normal_()
            optimizer.step()
            MegatronScorer(ddp, vocab_size=shape.vocab_size, layout=layout).topk(batch, 4)
            return ddp, optimizer, model

        used(small)  # what the libraries keep for themselves is there before anything is counted
        before = resident()
        kept = used(large)
        after = resident()
        count = sum(parameter.numel() for parameter in kept[-1].parameters())
        print(json.dumps({"parameters": count, "bytes_a_parameter": (after - before) / count}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

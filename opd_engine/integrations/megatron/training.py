"""Starting Megatron in ranks that have met already, and a bare model made trainable: its wrapper and its optimizer."""

from __future__ import annotations

import torch

from opd_engine.integrations.megatron.groups import MegatronGroups


def start_megatron(tp: int, pp: int, cp: int = 1, *, seed: int = 0) -> MegatronGroups:
    """Split the world; ranks of a tensor-parallel group are neighbours, then context, data and pipeline ranks.

    Raises: ValueError where the ranks do not divide, or where Megatron finds no CUDA device to ask.
    Communicates: every rank of the world must call.
    Mutates: megatron.core.parallel_state, and torch's generators.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    try:
        torch.cuda.current_device()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            "run.backend: megatron-core asks for a CUDA device wherever it runs, and there is none here; "
            "examples/megatron/train.py stands in for one on a CPU, to try things out"
        ) from error
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp
        )
    except RuntimeError as error:
        raise ValueError(f"run.tp={tp}, run.pp={pp}, run.cp={cp}: {error}") from error
    model_parallel_cuda_manual_seed(seed + 1)
    return MegatronGroups.from_parallel_state()


def stop_megatron() -> None:
    """Forget the groups, so that another layout may start in this process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def make_trainable(
    module: torch.nn.Module,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    distributed: bool = False,
):
    """(DistributedDataParallel around the module, its Adam).

    distributed: spread the optimizer's states over the data-parallel ranks
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        # A step on a gradient that is not finite would destroy the weights: the run ends instead.
        check_for_nan_in_grad=True,
    )
    model = DistributedDataParallel(module.config, options, module)
    dtype = module.config.params_dtype
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=lr,
            adam_beta1=beta1,
            adam_beta2=beta2,
            weight_decay=weight_decay,
            clip_grad=clip,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
        ),
        [model],
    )
    return model, optimizer

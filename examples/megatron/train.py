"""On-policy distillation inside Megatron, as `opd-engine train --run.backend megatron` does it, also without a GPU.

    torchrun --nproc-per-node 2 examples/megatron/train.py examples/megatron/arithmetic.toml --tp 2
    torchrun --nproc-per-node 4 examples/megatron/train.py examples/megatron/arithmetic.toml --tp 2 --run.pp 2

The arguments are those of `opd-engine train`. What runs is its loop over the actor of opd_engine/integrations/megatron:
rollouts by the current policy, two teachers, Megatron's schedules and optimizer, evaluation, checkpoints; this file
adds a stand-in for CUDA.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import on_cpu

    on_cpu.install()
    from opd_engine.cli import main

    sys.exit(main(["train", *sys.argv[1:], "--run.backend", "megatron"]))

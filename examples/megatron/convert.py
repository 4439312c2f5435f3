"""`opd-engine convert --check` where there is no GPU: Megatron's side of the comparison on a stand-in for CUDA.

    torchrun --nproc-per-node 4 examples/megatron/convert.py --check --tp 2 --pp 2 ./small ./small-megatron

Converting itself asks no stand-in: `opd-engine convert ./small ./small-megatron`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import on_cpu

    on_cpu.install()
    from opd_engine.cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))

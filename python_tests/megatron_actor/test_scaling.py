"""The byte model of docs/scaling.md against what small Megatron runs send: every op's bytes, layout by layout."""

import pytest

from foreign import needs_megatron
from megatron_actor.dense import Shape
from megatron_actor.layouts import LAYOUTS
from opd_engine.integrations.megatron.gpt_shape import GPTShape, Rope
from opd_engine.scaling.model import Layout, Pass, step_traffic
from ranks import run_ranks_once

pytestmark = [pytest.mark.ranks, pytest.mark.slow, needs_megatron]
K = 8
MEASURED = (
    "tp3 padded vocabulary",
    "dp2 distributed optimizer",
    "tp2 cp2",
    "tp2 pp2",
)
# What the model leaves out: digests, counts of sequences, what heads are checked by, whether a teacher is dead, norms,
# the metrics' vector, and the padding of buffers.
CONSTANTS = {"all_gather": 300, "all_reduce": 500, "broadcast": 500, "reduce_scatter": 0, "send": 0}


def measured(layout: str) -> list[dict]:
    return run_ranks_once("megatron_actor.scaling_ranks", "messages", LAYOUTS[layout].ranks, layout=layout)


def gpt_shape(shape: Shape, vocabulary: int) -> GPTShape:
    sizes = (shape.hidden, shape.layers, shape.heads, shape.groups, shape.head_size, shape.ffn)
    return GPTShape("qwen3", vocabulary, *sizes, 1e-6, Rope(1e4), shape.tied, 64)


@pytest.mark.parametrize("name", MEASURED)
def test_every_byte_that_grows_is_predicted(name, capsys):
    sizes = LAYOUTS[name]
    layout = Layout(sizes.tp, sizes.pp, sizes.cp, sizes.dp, sizes.sequence_parallel, sizes.distributed_optimizer)
    for rank, found in enumerate(measured(name)):
        student = gpt_shape(Shape(), found["vocabulary"])
        teacher = gpt_shape(Shape(hidden=24, heads=6, ffn=48, tied=False), found["vocabulary"])
        shapes = {"student": student, "teacher": teacher}
        # What context ranks exchange has the rows of the rank with most; before that each has its own.
        predicted = []
        for over_cp in (False, True):
            passes = [Pass(shapes[m], n, rows if over_cp else own, kind) for m, n, rows, own, kind in found["passes"]]
            told = step_traffic(passes, layout, k=K, stage=found["stage"], activation_bytes=4)
            predicted += [traffic for traffic in told if (traffic.over == "cp") == over_cp]
        told, sent = {}, {}
        for op in CONSTANTS:
            told[op] = sum(traffic.nbytes for traffic in predicted if traffic.op == op)
            sent[op] = sum(nbytes for kind, nbytes, group in found["messages"] if kind == op and group > 1)
        with capsys.disabled():
            print(
                f"\n{name}, rank {rank}: " + ", ".join(f"{op} {sent[op]} of {told[op]:.0f}" for op in told if sent[op])
            )
        for op, slack in CONSTANTS.items():
            padding = 0.01 * told[op] if layout.dp > 1 else 0.0
            assert told[op] <= sent[op] <= told[op] + slack + padding, (rank, op)

"""Through Megatron's ColumnParallelLinear with a tied head, TP 2, sequence parallel on and off, to the embedding."""

import pytest

import tolerances
from foreign import needs_megatron
from ranks import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow, needs_megatron]


@pytest.fixture(scope="module")
def result():
    return run_ranks("integration.column_parallel_ranks", "everything", 2, timeout=170)[0]


def test_the_embedding_gets_the_dense_gradient_on_every_path(result, capsys):
    tolerances.absorb(result["errors"])
    assert {row[0] for row in result["errors"]} == {"float32", "bfloat16"}
    with capsys.disabled():
        print("\nworst errors through ColumnParallelLinear")
        print("\n".join(tolerances.table()))


def test_every_control_is_red(result):
    missed = [name for name, red in result["controls"].items() if not red]
    assert not missed, f"planted errors that stayed green: {missed}"
    assert len(result["controls"]) == 2 * 6

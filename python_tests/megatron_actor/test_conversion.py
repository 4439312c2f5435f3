"""Hugging Face to Megatron and back at several layouts: weights bit-equal, logits transformers' own, mistakes seen."""

import pytest
import torch

from foreign import needs_megatron
from gpt_folders import MODELS, folder_tensors, logits, same_bits, write_folder
from ranks import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow, needs_megatron]
BOUND = 1e-5
"""Of the largest logit, float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For every model its folder, a checkpoint made of it by the command, and transformers' logits."""
    from opd_engine.convert import main

    root = tmp_path_factory.mktemp("conversion")
    for number, name in enumerate(MODELS):
        model = write_folder(root / name / "hf", name, seed=number)
        torch.save(logits(model), root / name / "logits.pt")
        assert main([str(root / name / "hf"), str(root / name / "megatron")]) == 0
    return root


@pytest.fixture(scope="module")
def measured(folder):
    return run_ranks("megatron_actor.conversion_ranks", "everything", 4, timeout=240, folder=str(folder))[0]


def test_logits_are_transformers_at_every_layout(measured, capsys):
    with capsys.disabled():
        for where, errors in measured.items():
            print(
                f"\n{where}: from the folder {errors['folder']:.1e}, the checkpoint {errors['checkpoint']:.1e}", end=""
            )
        print()
    assert len(measured) == 4 * len(MODELS)
    for where, errors in measured.items():
        assert errors["folder"] <= BOUND and errors["checkpoint"] <= BOUND, where


def test_every_planted_mistake_is_a_thousand_times_the_bound(measured, capsys):
    seen: dict[str, float] = {}
    for where, errors in measured.items():
        for what, value in errors.items():
            if what not in ("folder", "checkpoint"):
                seen[what] = min(value, seen.get(what, float("inf")))
                assert not value <= 1000 * BOUND, (where, what, value)
    with capsys.disabled():
        print("\nplanted, smallest over the models:", ", ".join(f"{w} {v:.2g}" for w, v in sorted(seen.items())))
    assert len(seen) == 9


@pytest.mark.parametrize("name", MODELS)
def test_what_megatron_saves_at_any_layout_comes_back_bit_equal(measured, folder, name):
    from transformers import AutoModelForCausalLM

    from opd_engine.convert import main

    original, wanted = folder_tensors(folder / name / "hf"), torch.load(folder / name / "logits.pt", weights_only=True)
    for layout in ("tp2 pp2", "tp4", "pp4"):
        saved, back = folder / name / f"saved {layout}", folder / name / f"back {layout}"
        assert main([str(saved), str(back), "--like", str(folder / name / "hf"), "--shard-gb", "0.0001"]) == 0
        assert same_bits(folder_tensors(back), original), layout
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(back).eval()), wanted), layout

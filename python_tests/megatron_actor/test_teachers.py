"""Inside Megatron, teachers never leave a trace in the student, checkpoints are whole or refused, metrics are exact."""

import re

import pytest

from foreign import needs_megatron
from megatron_actor.layouts import BOUND, LAYOUTS
from megatron_actor.samples import make_samples
from ranks import run_ranks_once

pytestmark = [pytest.mark.ranks, pytest.mark.slow, needs_megatron]
HERE = ("tp2 pp2", "dp2 distributed optimizer", "dp2 cp2 distributed optimizer")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two Qwen3 folders of wide random weights, tied and not, and a place for each layout's checkpoints."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    root = tmp_path_factory.mktemp("teachers")
    for tied in (True, False):
        torch.manual_seed(5)
        config = Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=tied,
        )
        folder, model = root / ("tied" if tied else "untied"), Qwen3ForCausalLM(config)
        model.save_pretrained(folder, max_shard_size="20KB")
        model = model.double().eval()
        with torch.no_grad():
            last = [model(sample.tokens[None]).logits[0, -1] for sample in make_samples()]
        torch.save(torch.stack(last), folder / "logits.pt")
    return root


def measured(layout: str, root) -> list[dict]:
    folder = root / layout.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    arguments = {"layout": layout, "folder": str(folder)}
    return run_ranks_once("megatron_actor.teacher_ranks", "everything", LAYOUTS[layout].ranks, **arguments)


@pytest.fixture(params=HERE)
def ranks(request, folders):
    return measured(request.param, folders)


def test_the_first_gradient_and_what_is_published_are_the_students(ranks):
    for rank in ranks:
        found = dict(rank["step_zero"])
        assert found.pop("inference only")
        assert any(case.get("asked") for case in found.values())
        for name, case in found.items():
            if name.startswith("exception"):
                of_others = "" if case["asked"] else "scoring failed on another data-parallel rank: "
                assert case["raised"] == f"RuntimeError: {of_others}planted", name
                assert case["tag"] == "student" and case["untouched"], name
            else:
                assert case["published"] and case["as separate modules"] <= BOUND, name
                assert case["kept as hidden states"] <= BOUND, name
            assert case["gradient"] <= BOUND, (name, case)


def test_earlier_students_and_their_mean_teach_the_student(ranks):
    """A student that is its own teacher has nothing to learn: its gradient is rounding."""
    for rank in ranks:
        assert rank["self_distillation"]["gradient"] <= BOUND, rank["self_distillation"]
        assert rank["self_distillation"]["of itself"] <= 1e-6, rank["self_distillation"]


def test_every_guard_fires(ranks):
    for rank in ranks:
        assert len(rank["guards"]) == 9
        for what, text in rank["guards"].items():
            assert text.startswith("WrongWeightsError"), what
            assert ("they are those of 'teacher:math'" if "live model" in what else "'teacher:code'") in text, what


def test_checkpoints_load_on_the_host_and_broken_ones_are_refused_by_name(ranks):
    for rank in ranks:
        found = rank["checkpoints"]
        assert found["live model not written"] and found["loaded"] and found["own module"]
        assert found["read of a trainer's checkpoint"] == []
        assert not found["ran foreign code"]
        for what, words in {
            "missing shard": f"1 of .* shards missing in .*: {found['shard']}",
            "truncated": f"{found['shard']} is cut short: wanted",
            "no metadata": "wanted .metadata in",
            "metadata cut": "/.metadata does not read",
            "foreign code": "posix.system is no part of a checkpoint's metadata",
            "other tokens": "token -> id maps of student and teacher 'code' disagree on 2 entries",
        }.items():
            text = found[what]
            assert text.startswith("ValueError: ") and "teacher 'code'" in text, (what, text)
            assert re.search(words, text), (what, text)


def test_a_transformers_folder_gives_its_logits(ranks):
    for rank in ranks:
        for kind, error in rank["qwen3_folder"].items():
            assert error <= 1e-5, kind


def test_metrics_do_not_depend_on_the_split(ranks):
    for rank in ranks:
        assert rank["metrics_of_any_split"]["error"] <= 1e-4, rank["metrics_of_any_split"]
        assert rank["metrics_of_any_split"]["between ranks"] == 0.0

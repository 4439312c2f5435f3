"""Before anything is loaded a run says what it is about to do; each line is what the folders and settings say."""

import torch
from safetensors.torch import save_file

from opd_engine.parallel.launch import World
from opd_engine.train.banner import banner
from opd_engine.train.config import TrainConfig
from opd_engine.train.experiment import Experiment
from opd_engine.train.prompts import Prompt


def folder(root, name, size, dtype):
    (root / name).mkdir()
    save_file({"head.weight": torch.zeros(size, 1000, dtype=dtype)}, root / name / "a.safetensors")
    save_file({"norm.weight": torch.ones(1000)}, root / name / "b.safetensors")
    return root / name


def lines_of(root, changes=(), checkpoint=None, ranks=1, **fields):
    config = TrainConfig()
    for section, key, value in (("run", "output_dir", "runs/mine"), *changes):
        setattr(getattr(config, section), key, value)
    values = {
        "student": folder(root, "student", 3, torch.float32),
        "teachers": {"math": folder(root, "math", 2000, torch.bfloat16)},
        "train": [Prompt([1] * n, "math", "math") for n in (3, 7)],
        "evaluation": [Prompt([2], "math", "math"), Prompt([2, 3], ("math", "code"), "all")],
    }
    world = World(0, ranks, 0, torch.device("cpu"))
    found = banner(config, world, Experiment(**values | fields), checkpoint)
    return {line[: line.index("  ")]: line[line.index("  ") :].strip() for line in found}


def test_it_says_what_will_run_on_what_and_where_it_goes(tmp_path):
    changes = [("rollout", "prompts", 8), ("rollout", "samples", 2), ("rollout", "max_new_tokens", 5)]
    said = lines_of(tmp_path, [*changes, ("run", "dtype", "bfloat16"), ("student", "lora_rank", 4)])
    assert list(said) == ["student", "teacher math", "prompts", "template", "a step", "device", "writes"]
    assert said["student"].startswith(f"{tmp_path}/student, 4K parameters in float32; trains in bfloat16 with float32")
    assert said["student"].endswith("adapters of rank 4")
    assert said["teacher math"] == f"{tmp_path}/math, 2M parameters in bfloat16; scores in bfloat16"
    assert said["prompts"] == ("2 to train and 1 held out for math; 0 to train and 1 held out for math+code")
    assert said["template"] == "none, prompts are plain text"
    assert f"up to 7 tokens each and 5 new ones: {8 * 2 * (7 + 5)} tokens at the most" in said["a step"]
    assert said["device"] == "hf on cpu" and said["writes"].startswith("runs/mine: ")


def test_a_continued_run_says_so_and_a_folder_that_cannot_be_read_is_no_error(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"short")
    said = lines_of(tmp_path, checkpoint=tmp_path / "step_00000010", ranks=4, teachers={"math": broken})
    assert said["continues"] == f"from {tmp_path}/step_00000010"
    assert said["teacher math"] == f"{broken}; scores in float32" and said["device"] == "hf on 4 ranks of cpu"

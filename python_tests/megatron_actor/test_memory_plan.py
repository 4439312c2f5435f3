"""The memory plan against what processes really take: a whole run of the loop at each layout, as a user starts it."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from foreign import needs_megatron
from gpt_folders import folder_tensors
from opd_engine.integrations.megatron.gpt_shape import GPTShape
from opd_engine.integrations.megatron.safetensors_stream import SafetensorsWriter
from opd_engine.integrations.megatron.weight_map import pieces, source_shapes
from ranks import ROOT, free_port

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.slow,
    needs_megatron,
    pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the resident peak from /proc"),
]
LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["--tp", "2"]),
    "pp2": (2, ["--run.pp", "2"]),
    "dp2 distributed optimizer": (2, []),
}
PROMPT_TOKENS, NEW_TOKENS = 124, 4
SETTINGS = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    # What torch frees goes back to the system at once, so that the resident peak is what was in use.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
VOCABULARY = 4096


def write_model(folder, family: str, **changes) -> None:
    """Random weights of 21 million parameters and more and a tokenizer of words, as a user's folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config = {"model_type": family, "vocab_size": VOCABULARY, "hidden_size": 512, "num_hidden_layers": 6}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1536}
    config |= {"max_position_embeddings": 256, "tie_word_embeddings": family == "qwen3", "rope_theta": 1e4} | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shape = GPTShape.read(folder, argument="model")
    parts = [part for piece in pieces(shape) for part in zip(piece.sources, source_shapes(shape, piece))]
    generator = torch.Generator().manual_seed(1)
    drawn = (
        (name, torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * 0.05)
        for name, size in parts
    )
    SafetensorsWriter(folder, {n: (s, torch.float32) for n, s in parts}, shard_bytes=10**9).write(drawn)
    words = {"<eos>": 0} | {f"w{number}": number for number in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    write_model(root / "student", "qwen3")
    write_model(root / "alike", "qwen3")
    write_model(root / "larger", "llama", num_hidden_layers=8)
    draw = torch.Generator().manual_seed(2)
    lines = []
    for number in range(32):
        words = torch.randint(1, VOCABULARY, (PROMPT_TOKENS,), generator=draw).tolist()
        prompt = " ".join(f"w{word}" for word in words)
        lines.append(json.dumps({"prompt": prompt, "teacher": ("alike", "larger")[number % 2]}))
    (root / "prompts.jsonl").write_text("\n".join(lines))
    return root


@functools.cache
def run(root, layout: str) -> tuple[pathlib.Path, list[dict[str, float]]]:
    """Two steps. Returns: the run's folder and what summary.json says of memory, by rank."""
    ranks, arguments = LAYOUTS[layout]
    place = root / layout.replace(" ", "_")
    flags = {
        "--student": root / "student",
        "--prompts": root / "prompts.jsonl",
        "--output-dir": place,
        "--run.threads": 1,
        "--data.max_prompt_tokens": PROMPT_TOKENS,
        "--data.held_out": 0.1,
        "--rollout.prompts": 12 * max(1, ranks if layout.startswith("dp") else 1),
        "--rollout.max_new_tokens": NEW_TOKENS,
        "--opd.k": 16,
        "--optimizer.steps": 2,
        "--optimizer.micro_batch": 12,
        "--eval.every": 2,
        "--checkpoint.every": 2,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += [str(ROOT / "examples" / "megatron" / "train.py"), *(str(x) for item in flags.items() for x in item)]
    command += [f"--teacher={name}={root / name}" for name in ("alike", "larger")]
    ran = subprocess.run([*command, *arguments], env=SETTINGS, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.startswith("memory plan: ")
    return place, json.loads((place / "summary.json").read_text())["memory"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(layout, folder, capsys):
    _, found = run(folder, layout)
    assert len(found) == LAYOUTS[layout][0]
    for rank, entry in enumerate(found):
        for what in ("", "saving_"):
            planned, measured = entry[f"{what}planned_bytes"] / 2**20, entry[f"{what}measured_bytes"] / 2**20
            with capsys.disabled():
                print(
                    f"\n{layout}, rank {rank}, {what}planned {planned:.0f} MiB, {what}measured {measured:.0f} "
                    f"({planned / measured - 1:+.1%})",
                    end="",
                )
            assert measured > 500, "too small to tell the model from the libraries"
            assert 0.9 <= planned / measured <= 1.1, what


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_a_training_checkpoint_becomes_a_hugging_face_folder(layout, folder, tmp_path):
    """Beside the optimizer's states, which have the weights' names; two steps away from what it began with."""
    from opd_engine.convert import main

    place, _ = run(folder, layout)
    checkpoint = str(max((place / "checkpoints").glob("step_*")))
    assert main([checkpoint, str(tmp_path / "back"), "--like", str(folder / "student")]) == 0
    before, after = folder_tensors(folder / "student"), folder_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    apart = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 0 < apart < 1e-3

"""Conversion without either framework: bit-equal both ways, streamed, atomic, and every wrong model refused by name."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_folders import MODELS, ROPES, SIZES, folder_tensors, logits, same_bits, write_folder
from opd_engine.convert import main
from opd_engine.integrations.megatron import convert, weight_map
from opd_engine.integrations.megatron.convert import HASHES, to_hugging_face, to_megatron
from opd_engine.integrations.megatron.gpt_shape import PUBLISHED, GPTShape, Rope
from opd_engine.integrations.megatron.safetensors_stream import SafetensorsWriter
from opd_engine.integrations.megatron.weight_map import pieces, source_shapes
from ranks import ROOT


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_is_bit_equal(name, dtype, tmp_path, capsys):
    model = write_folder(tmp_path / "hf", name, dtype=dtype)
    assert main([str(tmp_path / "hf"), str(tmp_path / "megatron")]) == 0
    assert main([str(tmp_path / "megatron"), str(tmp_path / "back"), "--shard-gb", "0.0001"]) == 0
    assert same_bits(folder_tensors(tmp_path / "hf"), folder_tensors(tmp_path / "back"))
    count = len(folder_tensors(tmp_path / "hf"))
    assert f"{count} of {count} have the bytes" in capsys.readouterr().out
    back = type(model).from_pretrained(tmp_path / "back", dtype=dtype).eval()  # reads the index of several shards
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    there = type(model).from_pretrained(tmp_path / "hf", dtype=dtype).eval()
    assert torch.equal(logits(back), logits(there))


def test_a_gate_that_comes_back_as_its_other_half_is_seen(tmp_path, monkeypatch):
    """Planted on the way back alone; a mistake made both ways shows in the logits, in python_tests/megatron_actor."""
    write_folder(tmp_path / "hf", "qwen3 untied")
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    plain = weight_map.taken_apart
    monkeypatch.setattr(
        convert, "taken_apart", lambda t, how, shape: plain(t, how, shape)[:: -1 if how == "gate" else 1]
    )
    done = to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    assert not same_bits(folder_tensors(tmp_path / "hf"), folder_tensors(tmp_path / "back"))
    assert done.unchanged == done.tensors - 2 * SIZES["num_hidden_layers"]


def test_a_result_that_reads_back_otherwise_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    write_folder(tmp_path / "hf", "llama tied")
    write = convert.write_tensors

    def one_bit_off(folder, pieces, produce):
        write(folder, pieces, produce)
        file = next(folder.glob("*.distcp"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(convert, "write_tensors", one_bit_off)
    with pytest.raises((ValueError, RuntimeError), match=r"does not read back|reading|CRC|archive"):
        to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_conversion_that_dies_leaves_the_old_target_and_its_remains_are_cleared(tmp_path):
    write_folder(tmp_path / "hf", "llama tied")
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    before = {path.name: path.read_bytes() for path in (tmp_path / "megatron").iterdir()}
    script = (
        "import os, sys\n"
        "from opd_engine.integrations.megatron.convert import to_megatron\n"
        "calls = []\n"
        "def die(what, size, total):\n"
        "    calls.append(what)\n"
        "    if len(calls) == 9: os._exit(9)\n"
        "to_megatron(sys.argv[1], sys.argv[2], overwrite=True, moved=die)\n"
    )
    arguments = [str(tmp_path / "hf"), str(tmp_path / "megatron")]
    assert subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT).returncode == 9
    assert {path.name: path.read_bytes() for path in (tmp_path / "megatron").iterdir()} == before
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".writing-megatron-")]
    to_megatron(tmp_path / "hf", tmp_path / "megatron", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_a_target_that_is_holds_or_links_to_its_source_is_refused_and_nothing_is_lost(tmp_path, capsys):
    source = tmp_path / "here" / "hf"
    source.parent.mkdir()
    write_folder(source, "llama tied")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "files").mkdir()  # a folder whose files lie in another, as a hub's cache has them
    for file in source.iterdir():
        (tmp_path / "files" / file.name).symlink_to(file)
    to_megatron(source, tmp_path / "megatron")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    megatron = tmp_path / "megatron"
    for arguments in (
        [source, source],
        [source, tmp_path / "link"],
        [tmp_path / "link", source],
        [source, source / "megatron"],
        [source, source.parent],
        [source, tmp_path / "here" / ".." / "here" / "hf"],
        [tmp_path / "files", source],
        [megatron, megatron],
        [megatron, source, "--like", source],
    ):
        assert main([*map(str, arguments), "--overwrite"]) == 2, arguments
        assert "hold or link to each other" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def big_folder(folder) -> int:
    """A model of 243 MB whose largest tensor has 17 MB. Returns: its bytes."""
    config = {"model_type": "qwen3", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    config |= {"num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 4096, "vocab_size": 8192}
    config |= {"max_position_embeddings": 128, "tie_word_embeddings": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shape = GPTShape.read(folder, argument="model")
    parts = [part for piece in pieces(shape) for part in zip(piece.sources, source_shapes(shape, piece))]
    tensors = {name: (size, torch.float32) for name, size in parts}
    written = ((name, torch.full(size, number)) for number, (name, size) in enumerate(parts, start=1))
    SafetensorsWriter(folder, tensors, shard_bytes=10**9).write((name, t.float()) for name, t in written)
    return sum(torch.Size(size).numel() * 4 for _, size in parts)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the resident peak from /proc")
def test_memory_is_a_few_tensors_whatever_the_model(tmp_path, capsys):
    total = big_folder(tmp_path / "hf")
    script = (
        "import re, sys\n"
        "from opd_engine.integrations.megatron import convert\n"
        "status = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read()).group(1)) * 1024\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = status()\n"
        "convert.to_megatron(sys.argv[1], sys.argv[2])\n"
        "print(status() - before)\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "convert.to_hugging_face(sys.argv[2], sys.argv[3])\n"
        "print(status() - before)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, *(str(tmp_path / name) for name in ("hf", "megatron", "back"))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    there, back = map(int, ran.stdout.split())
    with capsys.disabled():
        print(f"\nconverting {total / 1e6:.0f} MB took {there / 1e6:.0f} MB there and {back / 1e6:.0f} MB back")
    assert max(there, back) < 0.5 * total


def rewritten(folder, change) -> None:
    """The folder's one file after change(tensors)."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_a_model_that_does_not_fit_is_refused_by_the_tensors_name_before_anything_is_written(tmp_path):
    q_proj, up = "model.layers.2.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
    changes = {
        f"{q_proj}: wanted [128, 64] as config.json says, got [120, 64]": lambda t: t.update(
            {q_proj: t[q_proj][:120].clone()}
        ),
        f"has no {up}": lambda t: t.pop(up),
        "has 1 tensors that no qwen3 has: model.layers.0.self_attn.q_proj.bias": lambda t: t.update(
            {"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}
        ),
        "wanted one of F64, F32, F16, BF16, got I32": lambda t: t.update({q_proj: t[q_proj].int()}),
    }
    for number, (message, change) in enumerate(changes.items()):
        folder = tmp_path / str(number)
        write_folder(folder, "qwen3 untied")
        rewritten(folder, change)
        with pytest.raises(ValueError, match=re.escape(message)):
            to_megatron(folder, tmp_path / "megatron")
        assert not (tmp_path / "megatron").exists()


def test_a_checkpoint_of_another_shape_is_refused_by_the_tensors_name(tmp_path):
    write_folder(tmp_path / "hf", "qwen3 untied")
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for key, value, message in (
        ("num_hidden_layers", 3, "linear_qkv.layer_norm_weight: wanted [3, 64] as config.json says, got [4, 64]"),
        ("intermediate_size", 80, "mlp.linear_fc1.weight: wanted [4, 160, 64] as config.json says, got [4, 192, 64]"),
        ("vocab_size", 400, "embedding.word_embeddings.weight: wanted [400, 64] as config.json says, got [384, 64]"),
        ("model_type", "llama", "has decoder.layers.self_attention.k_layernorm.weight, which no llama has"),
    ):
        other = tmp_path / key
        other.mkdir()
        (other / "config.json").write_text(json.dumps(config | {key: value, "layer_types": None}))
        with pytest.raises(ValueError, match=re.escape(message)):
            to_hugging_face(tmp_path / "megatron", tmp_path / "back", like=other)
    (tmp_path / "megatron" / "config.json").unlink()
    with pytest.raises(ValueError, match="name a Hugging Face folder of the same model"):
        to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    next((tmp_path / "megatron").glob("*.distcp")).unlink()
    with pytest.raises(ValueError, match="1 of 1 shards missing"):
        to_hugging_face(tmp_path / "megatron", tmp_path / "back", like=tmp_path / "hf")


def test_what_is_there_is_not_overwritten_unasked(tmp_path, capsys):
    write_folder(tmp_path / "hf", "llama tied")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years")
    for extra in ([], ["--overwrite"]):
        assert main([str(tmp_path / "hf"), str(tmp_path / "taken"), *extra]) == 2
        assert (tmp_path / "taken" / "thesis.tex").read_text() == "years"
    assert "is there already" in (said := capsys.readouterr().err) and "holds no model" in said
    assert main([str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "config.json" in capsys.readouterr().err


def test_dtype_is_changed_once_and_config_says_so(tmp_path):
    write_folder(tmp_path / "hf", "llama untied")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "modeling.py").write_text("raise SystemExit")
    to_megatron(tmp_path / "hf", tmp_path / "megatron", dtype=torch.bfloat16)
    done = to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    assert done.unchanged == done.tensors
    wanted = {name: tensor.bfloat16() for name, tensor in folder_tensors(tmp_path / "hf").items()}
    assert same_bits(wanted, folder_tensors(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert "tokenizer.json" in names and not names & {"modeling.py", HASHES, "metadata.json"}


def test_a_tied_head_that_is_written_out_is_read_as_transformers_reads_it(tmp_path):
    model = write_folder(tmp_path / "hf", "qwen3 tied")
    rewritten(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "back").eval()), logits(model))


@pytest.mark.parametrize("kind", ROPES)
def test_rope_is_what_transformers_computes(kind, tmp_path):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for theta, head_dim in ((1e4, 64), (5e5, 128), (1e6, 128)):
        said = {**ROPES[kind], "rope_theta": theta}
        if "original_max_position_embeddings" in said:
            said["original_max_position_embeddings"] = 8192
        config = LlamaConfig(**{**SIZES, "head_dim": head_dim}, rope_parameters=dict(said))
        theirs = LlamaRotaryEmbedding(config)
        config.save_pretrained(tmp_path)
        rope = GPTShape.read(tmp_path, argument="model").rope
        torch.testing.assert_close(rope.inverse_frequencies(head_dim), theirs.inv_freq, rtol=1e-6, atol=0)
        # The older way of writing it: rope_theta beside rope_scaling, the kind called `type`.
        older = json.loads((tmp_path / "config.json").read_text())
        settings = older.pop("rope_parameters")
        older |= {
            "rope_theta": settings.pop("rope_theta"),
            "rope_scaling": {"type": settings.pop("rope_type")} | settings,
        }
        if kind == "default":
            older["rope_scaling"] = None
        assert GPTShape.from_config(older, argument="older").rope == rope


def test_what_is_not_built_is_refused_by_its_key(tmp_path):
    write_folder(tmp_path, "llama tied")
    config = json.loads((tmp_path / "config.json").read_text())
    for changed, message in (
        ({"model_type": "mixtral"}, "model_type: wanted one of qwen3, llama, got 'mixtral'"),
        ({"attention_bias": True}, "attention_bias: wanted False, got True"),
        ({"mlp_bias": True}, "mlp_bias: wanted False, got True"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act: wanted 'silu', got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: wanted a divisor of 8"),
        ({"vocab_size": None}, "vocab_size: wanted a positive integer, got None"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: wanted one of"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor: wanted a number, got None"),
        ({"rope_parameters": {**ROPES["yarn"], "mscale": 0.7}}, "mscale: wanted None or none, got 0.7"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            GPTShape.from_config(config | changed, argument="model")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.3-70b", 70_553_706_496),
    ],
)
def test_the_published_sizes_have_the_published_number_of_parameters(name, parameters):
    shape = PUBLISHED[name]
    found = 0
    for piece in weight_map.pieces(shape):
        found += sum(torch.Size(size).numel() for size in weight_map.source_shapes(shape, piece))
    assert found == parameters
    assert shape.rope.kind == ("default" if shape.family == "qwen3" else "llama3")


def test_published_shapes_are_what_their_config_says(tmp_path):
    """Written down again as a config.json, of which the common keys are known by heart."""
    said = {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "max_position_embeddings": 131_072,
    }
    assert GPTShape.from_config(said, argument="model") == PUBLISHED["llama-3.1-8b"]
    assert PUBLISHED["qwen3-8b"].rope == Rope(1e6)


def test_help_says_which_way_and_gives_examples():
    ran = subprocess.run(
        [sys.executable, "-m", "opd_engine", "convert", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0
    for word in ("SOURCE", "TARGET", "--like", "--dtype", "--overwrite", "--check", "examples:", "Exit status"):
        assert word in ran.stdout

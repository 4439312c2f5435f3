"""A matrix of wrong folders, files and settings: one line each, that names the thing and what it is, before a model is
loaded.
"""

import json
import shutil

import pytest

from opd_engine.cli import main
from opd_engine.train.folders import balancing_loss
from tiny_models import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "whole")


@pytest.fixture
def place(tmp_path, model, monkeypatch):
    """Two folders of one model and prompts; nothing of a model is loaded in here."""
    for name in ("student", "teacher"):
        shutil.copytree(model, tmp_path / name)
    prompts(tmp_path, {"prompt": "1+1=", "label": "2"}, {"prompt": "2+2=", "label": "4"})
    monkeypatch.setattr("opd_engine.train.backends.hf.load_model", lambda *a, **k: pytest.fail("loaded"))
    return tmp_path


def prompts(folder, *lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "p.jsonl").write_text(text, encoding="utf-8")


def refusal(capsys, place, *more, status=2):
    arguments = ["--student", str(place / "student"), "--teacher", f"t={place / 'teacher'}"]
    arguments += ["--prompts", str(place / "p.jsonl"), "--output-dir", str(place / "run"), "--run.quiet"]
    assert main(["train", *arguments, *map(str, more)]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0], lines
    assert not (place / "run" / "config.toml").exists()
    return lines[0]


def edited(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()


def adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def replaced_by_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize(
    "change, said",
    [
        (without_tokenizer, "holds no tokenizer (tokenizer.json or the like)"),
        (shutil.rmtree, "wanted a model's folder, got "),
        (replaced_by_a_file, "wanted a model's folder, got the file "),
        (lambda folder: (folder / "config.json").unlink(), "got a folder without config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "wanted an object, got list"),
        (lambda folder: edited(folder, architectures=["BertForMaskedLM"]), "got BertForMaskedLM in "),
        (lambda folder: edited(folder, architectures=["BertLMHeadModel"]), "got BertLMHeadModel in "),
        (lambda folder: edited(folder, is_encoder_decoder=True), "got an encoder and decoder (Qwen3ForCausalLM)"),
    ],
)
def test_a_folder_is_named_as_what_it_is(capsys, place, which, change, said):
    change(place / which)
    key = "student.path: " if which == "student" else "teachers.t: "
    line = refusal(capsys, place)
    assert key in line and said in line and str(place / which) in line


def test_an_adapters_folder_is_named_where_a_model_is_wanted(capsys, place):
    adapter(place / "student")
    assert "student.path: wanted a causal LM's folder, got an adapter's folder, without" in refusal(capsys, place)


@pytest.mark.parametrize(
    "config, found",
    [
        ({"num_experts": 8, "router_aux_loss_coef": 0.001}, ("router_aux_loss_coef", 0.001)),
        ({"num_local_experts": 8, "router_aux_loss_coef": 0.0}, None),
        ({"text_config": {"n_routed_experts": 8, "aux_loss_alpha": 0.01}}, ("aux_loss_alpha", 0.01)),
        ({"num_experts": 0, "router_aux_loss_coef": 0.001}, None),
        ({"router_aux_loss_coef": 0.001}, None),
    ],
)
def test_a_balancing_loss_is_found(config, found, tmp_path):
    assert balancing_loss(config, tmp_path) == found


def test_a_student_whose_balancing_loss_would_be_left_out_is_refused_and_a_teacher_is_not(capsys, place):
    edited(place / "student", num_experts=4, router_aux_loss_coef=0.02)
    line = refusal(capsys, place)
    assert "student.path: " in line and "(router_aux_loss_coef = 0.02), which is not computed" in line
    shutil.rmtree(place / "student")
    from transformers import Qwen3MoeConfig

    shutil.copytree(place / "teacher", place / "student")
    Qwen3MoeConfig(num_experts=4).save_pretrained(place / "student")
    silent = json.loads((place / "student" / "config.json").read_text())
    silent.pop("router_aux_loss_coef", None)
    (place / "student" / "config.json").write_text(json.dumps(silent | {"architectures": ["Qwen3MoeForCausalLM"]}))
    assert "(router_aux_loss_coef = 0.001)" in refusal(capsys, place), "transformers' own, where the file is silent"


@pytest.mark.parametrize("which, key", [("student", "student.path"), ("teacher", "teachers.t")])
def test_positions_are_compared_with_the_longest_prompt_and_its_answer(capsys, place, which, key):
    edited(place / which, model_type="gpt2", max_position_embeddings=131, architectures=["GPT2LMHeadModel"])
    line = refusal(capsys, place)
    assert f"{key}: wanted a model of at least 132 positions, for the longest prompt's 4 tokens" in line


CHAT = {"prompt": [{"role": "user", "content": "1"}]}


@pytest.mark.parametrize(
    "lines, more, said",
    [
        (["\ufeff" + json.dumps({"promt": "x"})], [], "line 1: wanted a `prompt`, got the keys 'promt'"),
        (["not json"], [], "line 1: not JSON"),
        ([""], [], "wanted at least one record, got an empty file"),
        ([{"prompt": ""}], [], "wanted at least one record, got 1 empty ones"),
        ([CHAT], [], "line 1: prompt: got messages, and the student's tokenizer has no chat template"),
        ([{"prompt": "1", "teacher": "nobody"}], [], "line 1: teacher: wanted one of t, got 'nobody'"),
        ([{"prompt": "12+3="}], ["--data.max_prompt_tokens", "4"], "got 5; data.overlong"),
        (
            [{"prompt": "12+3="}],
            ["--data.max_prompt_tokens", "4", "--data.overlong", "skip"],
            "wanted at least one prompt, got none: 1 prompt skipped, too long",
        ),
        (
            [{"prompt": "1"}],
            ["--data.chat_template_kwargs", '{"a": 1}'],
            "data.chat_template_kwargs: wanted prompts of messages",
        ),
        (
            [{"prompt": "1"}],
            ["--data.chat_template_kwargs", "thinking"],
            "--data.chat_template_kwargs: wanted dict, got str",
        ),
        ([{"prompt": "1"}], ["--data.system_prompt", "x"], "data.system_prompt: wanted prompts of messages"),
        (
            [{"prompt": "1"}, {"prompt": "2"}],
            ["--opd.reward_beta", "1"],
            "opd.reward_beta = 1.0: wanted a label (label) in every prompt",
        ),
        (
            [{"prompt": "1"}, {"prompt": "2"}],
            ["--opd.policy_coefficient", "1", "--rollout.samples", "2"],
            "opd.policy_coefficient = 1.0: wanted a label",
        ),
    ],
)
def test_a_prompts_file_that_cannot_serve_is_named_by_its_line(capsys, place, lines, more, said):
    prompts(place, *lines)
    got = refusal(capsys, place, *more)
    assert said in got, got


def test_a_mixture_over_prompts_of_one_teacher_each_is_refused(capsys, place):
    second = ["--teacher", f"u={place / 'teacher'}"]
    prompts(place, {"prompt": "1", "teacher": "t"}, {"prompt": "2", "teacher": "u"})
    line = refusal(capsys, place, *second, "--opd.mixture", "arithmetic")
    assert 'opd.mixture: got "arithmetic", and every prompt of ' in line and "has one teacher" in line
    prompts(place, {"prompt": "1", "teacher": "all"}, {"prompt": "2", "teacher": "u"})
    assert 'line 1: teacher: wanted one for opd.mixture = "route", got t, u' in refusal(capsys, place, *second)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--opd.policy_coefficient", "1"], "opd.policy_coefficient = 1.0: wanted rollout.samples >= 2, got 1"),
        (
            ["--rollout.temperature", "0", "--rollout.samples", "2"],
            "rollout.samples: wanted 1 for rollout.temperature = 0",
        ),
        (
            ["--opd.policy_coefficient", "1", "--rollout.samples", "2", "--rollout.top_k", "5"],
            "opd.policy_coefficient: the ratios of an unchanged policy are not 1 with rollouts of another",
        ),
        (
            ["--opd.state_weight_cap", "2", "--rollout.temperature", "0.7"],
            "opd.state_weight_cap: the ratios of an unchanged policy are not 1 with",
        ),
        (["--opd.measure_overlap", "--opd.support", "teacher"], 'opd.measure_overlap: wanted opd.support = "student"'),
        (["--opd.mixture", "loss_sum", "--data.mixing", "equal"], 'data.mixing: wanted "proportional"'),
        (["--run.device", "gpu"], "run.device: wanted cpu, cuda or cuda:N, got 'gpu'"),
        (["--rollout.top_logprobs", "3"], 'rollout.top_logprobs: wanted 0 for opd.support = "student"'),
        (["--student", "again"], "--student: given twice, "),
        (["--teacher", "t=again"], "--teacher: 't' is given twice, "),
        (["--prompts", "again"], "--prompts: given twice, "),
    ],
)
def test_settings_that_cannot_work_together_are_named(capsys, place, flags, said):
    line = refusal(capsys, place, *flags)
    assert said in line, line


def test_a_run_does_not_go_into_its_models_folder(capsys, place):
    for folder in (place / "student", place / "teacher" / "run"):
        line = refusal_at(capsys, place, folder)
        assert "run.output_dir: wanted a folder apart from" in line
    (place / "file").write_text("")
    assert "run.output_dir: wanted a folder, got the file" in refusal_at(capsys, place, place / "file")


def refusal_at(capsys, place, folder):
    arguments = ["--student", str(place / "student"), "--teacher", f"t={place / 'teacher'}"]
    assert main(["train", *arguments, "--prompts", str(place / "p.jsonl"), "--output-dir", str(folder)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--student", "s"], "student.path: data.task = \"text\" makes its own, got 's'"),
        (["--prompts", "p"], 'data.prompts: data.task = "text" makes its own'),
        (["--opd.reward_beta", "1"], 'opd.reward_beta: wanted prompts with labels, data.task = "text" trains on none'),
    ],
)
def test_an_example_takes_nothing_that_it_would_not_use(capsys, flags, said):
    assert main(["train", "--data.task", "text", *flags]) == 2
    assert said in capsys.readouterr().err

"""Settings: one declaration behind TOML, flags and help; every mistake is named with what was wanted and what came."""

import dataclasses
import re

import pytest

from opd_engine.cli import main
from opd_engine.train.config import (
    TrainConfig,
    all_settings,
    apply_toml,
    config_from_toml,
    config_to_toml,
    differences,
)
from opd_engine.train.settings import ConfigError, check_value, look_up, nearest, parse_text
from opd_engine.train.teacher_settings import TeacherSettings
from ranks import ROOT


def configured(tmp_path, text: str) -> TrainConfig:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return config_from_toml(path)


def refusal(capsys, *arguments: str) -> str:
    assert main(["train", *arguments]) == 2
    return capsys.readouterr().err


def test_every_setting_has_help_and_a_default_that_passes_its_own_check():
    for setting in all_settings():
        assert setting.metadata.get("help"), setting.key
        assert check_value(setting, setting.default, "") == setting.default
        assert setting.default is not None or setting.optional, setting.key


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert len(re.findall(r"--[a-z]+\.[a-z_0-9.]+ (?:INT|FLOAT|TEXT|JSON|\[true)", shown)) <= 75
    for setting in all_settings():
        assert (f"--{setting.key} " in shown) is not bool(setting.metadata.get("rare"))
        if setting.metadata.get("rare"):
            continue
        assert " ".join(setting.describe().split())[:30] in shown
    assert "--teacher NAME=DIR" in shown and "--prompts FILE" in shown and "--resume" in shown


def test_a_configuration_survives_being_written_and_read(tmp_path):
    config = TrainConfig()
    config.teachers = {"math": "models/math", "odd name": 'quo"ted'}
    config.optimizer.lr, config.opd.teacher_log_prob_min, config.run.overwrite = 1e-5, -20.0, True
    assert configured(tmp_path, config_to_toml(config)) == config


def test_a_teacher_may_have_a_table_and_survives_being_written(tmp_path):
    text = '[teachers]\na = "x"\n[teachers.b]\npath = "y"\nweight = 2\ntemperature = 0.5\nprompt_prefix = "Think. "\n'
    config = configured(tmp_path, text + '[teachers."odd name"]\npath = "z"\ndtype = "bfloat16"\n')
    assert config.teachers == {
        "a": "x",
        "b": TeacherSettings("y", 2.0, 0.5, "Think. "),
        "odd name": TeacherSettings("z", dtype="bfloat16"),
    }
    assert configured(tmp_path, config_to_toml(config)) == config
    plain = configured(tmp_path, '[teachers.a]\npath = "x"\n')
    assert differences(plain, configured(tmp_path, '[teachers]\na = "x"\n')) == []
    assert len(differences(plain, config)) == 1
    for entry, words in (
        ('weigth = 1\npath = "x"', "unknown key teachers.a.weigth; did you mean weight"),
        ("weight = 1", "teachers.a.path: wanted a folder"),
        ('path = "x"\nweight = -1', "teachers.a.weight: wanted at least 0"),
        ('path = "x"\ndtype = "int8"', "teachers.a.dtype: wanted one of"),
    ):
        with pytest.raises(ConfigError, match=words):
            configured(tmp_path, f"[teachers.a]\n{entry}\n")


def test_flags_win_over_the_file(tmp_path, monkeypatch):
    path = tmp_path / "run.toml"
    path.write_text('[data]\ntask = "arithmetic"\n[opd]\nk = 8\ndivergence = "jsd"\n')
    seen = []
    monkeypatch.setattr("opd_engine.train.loop.run", lambda config: seen.append(config) or {})
    flags = ["--opd.k", "4", "--run.quiet", "--opd.teacher_log_prob_min=-9", "--tp", "2", "--output-dir", "there"]
    assert main(["train", str(path), *flags]) == 0
    config = seen[0]
    assert (config.opd.k, config.opd.divergence, config.run.quiet) == (4, "jsd", True)
    assert (config.opd.teacher_log_prob_min, config.run.tp, config.run.output_dir) == (-9.0, 2, "there")


def test_a_project_without_wandb_is_refused_before_anything_begins(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(capsys, "--data.task", "arithmetic", "--run.wandb_project", "mine")
    assert "run.wandb_project: got 'mine', and wandb is not installed" in message


def test_resume_on_the_command_line_wins_over_overwrite_in_the_file(monkeypatch):
    seen = []
    monkeypatch.setattr("opd_engine.train.loop.run", lambda config: seen.append(config) or {})
    example = str(ROOT / "examples" / "arithmetic.toml")
    assert main(["train", example]) == main(["train", example, "--resume"]) == 0
    assert [(c.run.resume, c.run.overwrite) for c in seen] == [(False, True), (True, False)]


def test_bring_your_own_needs_no_file(monkeypatch):
    seen = []
    monkeypatch.setattr("opd_engine.train.loop.run", lambda config: seen.append(config) or {})
    assert main(["train", "--student", "s", "--teacher", "a=x", "--teacher", "b=y=z", "--prompts", "p.jsonl"]) == 0
    assert seen[0].teachers == {"a": "x", "b": "y=z"} and seen[0].student.path == "s"
    assert seen[0].data.prompts == "p.jsonl"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[opd]\ndivergance = 'jsd'", ["unknown key opd.divergance", "did you mean opd.divergence?"]),
        ("[optimiser]\nlr = 1e-3", ["unknown key optimiser.lr", "optimizer.lr"]),
        ("learning_rate = 1", ["unknown key learning_rate"]),
        ("[opd]\nk = '8'", ["opd.k", "wanted int", "str '8'"]),
        ("[opd]\nk = true", ["opd.k", "wanted int", "bool"]),
        ("[run]\nquiet = 1", ["run.quiet", "wanted bool", "int 1"]),
        ("[optimizer]\nlr = nan", ["optimizer.lr", "nan"]),
        ("[rollout]\ntemperature = -1", ["rollout.temperature", "at least 0", "-1"]),
        ("[data]\nmixing = 'equel'", ["data.mixing", "wanted one of", "did you mean equal?"]),
        ("[teachers]\na = 3", ["teachers.a", "3"]),
        ("[opd\nk = 8", ["not TOML", "line 1"]),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        configured(tmp_path, text)
    for word in ["run.toml", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--opd.divergance", "jsd"], ["unknown argument --opd.divergance", "did you mean --opd.divergence?"]),
        (["--steps", "3"], ["unknown argument --steps", "--optimizer.steps"]),
        (["--opd.k", "many"], ["--opd.k", "wanted int", "'many'"]),
        (["--teacher", "math"], ["--teacher", "NAME=DIR", "'math'"]),
        (["nowhere.toml"], ["nowhere.toml", "cannot read"]),
        ([], ["student.path", "--student DIR"]),
        (["--student", "s"], ["data.prompts", "--prompts FILE"]),
        (["--student", "s", "--prompts", "p"], ["teachers", "--teacher NAME=DIR"]),
        (["--data.task", "arithmetic", "--teacher", "a=b"], ["teachers", "makes its own"]),
        (["--data.task", "arithmetic", "--resume", "--overwrite"], ["run.overwrite", "resume"]),
        (["--data.task", "text", "--text.prompt_tokens", "64"], ["text.prompt_tokens", "64"]),
        (["--data.task", "arithmetic", "--run.cp", "2"], ["run.cp: wanted 1", "got 2", "megatron"]),
    ],
)
def test_a_mistake_on_the_command_line_is_named(capsys, arguments, words):
    message = refusal(capsys, *arguments)
    for word in words:
        assert word in message


SAMPLED = ("--opd.loss_type", "advantage", "--opd.support", "rollout")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--opd.tail", "truncate", "--opd.divergence", "reverse_kl"], ["opd.tail", "cannot distil", "shrinking"]),
        (["--opd.tail", "renormalize", "--opd.k", "1"], ["opd.tail", "cannot distil", "always zero"]),
        (["--opd.loss_type", "advantage", "--opd.support", "student"], ["opd.loss_type", "expected gradient"]),
        (
            ["--opd.loss_type", "advantage", "--opd.support", "rollout", "--rollout.temperature", "0"],
            ["rollout.temperature"],
        ),
        (["--opd.loss_type", "advantage", "--opd.support", "rollout", "--rollout.top_k", "5"], ["top_k 5"]),
        (["--opd.policy_coefficient", "0.5", "--rollout.top_p", "0.9"], ["opd.policy_coefficient", "top_p 0.9"]),
        (["--opd.policy_coefficient", "0.5", "--rollout.temperature", "0.7"], ["not 1", "temperature 0.7"]),
        (["--opd.temperature", "0"], ["opd.temperature", "> 0"]),
        (["--opd.k", "0"], ["opd.k", ">= 1"]),
        (["--opd.divergence", "kl"], ["opd.divergence", "forward_kl"]),
    ],
)
def test_what_cannot_distil_is_refused_before_anything_is_loaded(capsys, flags, words):
    message = refusal(capsys, "--data.task", "arithmetic", *flags)
    for word in words:
        assert word in message


def test_a_resumed_run_may_change_what_is_written_but_not_what_is_computed():
    saved, given = TrainConfig(), TrainConfig()
    given.run.output_dir, given.eval.every, given.checkpoint.keep = "elsewhere", 7, 5
    assert differences(saved, given) == []
    given.opd.k, given.run.seed = 3, 1
    assert differences(saved, given) == ["run.seed: saved 0, given 1", f"opd.k: saved {saved.opd.k}, given 3"]


def test_the_nearest_key_is_found_by_its_last_part_and_a_stranger_by_none():
    keys = [setting.key for setting in all_settings()]
    assert nearest("max_new_token", keys) == "; did you mean rollout.max_new_tokens?"
    assert nearest("zzzz", keys) == ""


def test_text_of_a_flag_reads_as_its_type():
    by_key = {setting.key: setting for setting in all_settings()}
    assert parse_text(by_key["run.quiet"], "True") is True
    assert parse_text(by_key["opd.union_cap"], "none") is None
    assert parse_text(by_key["opd.teacher_log_prob_min"], "-3") == -3.0
    assert look_up(TrainConfig(), "arithmetic.teacher.steps") == 500


def test_applying_a_file_changes_only_what_it_names():
    config = TrainConfig()
    apply_toml(config, {"opd": {"k": 5}}, "inline")
    assert dataclasses.replace(config, opd=TrainConfig().opd) == TrainConfig()
    assert config.opd.k == 5

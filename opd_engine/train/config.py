"""Everything `opd-engine train` can be told: one dataclass a section; TOML keys, flags and help follow from it.

The section [opd] is the distillation floor's own OPDConfig, so that a setting means the same in every trainer.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import opd_engine
from opd_engine.distillation.config import OPDConfig
from opd_engine.packages import EXTRAS, is_installed, require
from opd_engine.train.examples.settings import ArithmeticConfig, TextConfig, check_example
from opd_engine.train.settings import (
    ConfigError,
    Setting,
    assign,
    check_value,
    described,
    flatten_tables,
    leaves,
    look_up,
    nearest,
    parse_text,
    show,
    to_toml,
)
from opd_engine.train.teacher_settings import Teachers, read_teacher, settings_of, teachers_to_toml, with_path
from opd_engine.train.validation import check_pairs


@dataclass
class RunConfig:
    """Where and how the run happens."""

    output_dir: str = described("runs/train", "folder for checkpoints, metrics, plots and the summary")
    seed: int = described(0, "seed of the data order, the rollouts and what is made from nothing", min=0)
    threads: int = described(0, "torch's intra-op threads, 0 leaves torch's default; tiny models want 1", min=0)
    device: str = described("cpu", "where the models live, as torch names it: cpu, cuda, cuda:1")
    dtype: str = described("float32", "of the parameters", choices=("float32", "float64", "bfloat16", "float16"))
    backend: str = described(
        "hf", "what trains the student: transformers here, or megatron-core", choices=("hf", "megatron")
    )
    tp: int = described(1, "ranks that share the LM head, and with megatron every layer", unit="processes", min=1)
    pp: int = described(1, "megatron: pipeline stages", unit="processes", min=1)
    cp: int = described(1, "megatron: ranks that share a sequence", unit="processes", min=1)
    teacher_weights: str = described(
        "auto",
        "teachers of the student's shape take its place in turn (switch, megatron's choice where it can), or each is a "
        "module of its own, on the host between turns (staged) or always on the device (resident, the choice of hf)",
        choices=("auto", "switch", "staged", "resident"),
    )
    workspace_bytes: int = described(
        0,
        "logits that exist at a time; the LM head then works in chunks and gives its gradients with the loss, 0 makes "
        "the logits of all rows that count",
        unit="bytes",
        min=0,
    )
    recompute: str = described(
        "none",
        "megatron: what the backward computes again instead of keeping: attention's scores (selective), or all of a "
        "layer but its input (full)",
        choices=("none", "selective", "full"),
    )
    offload: bool = described(False, "hf on several ranks: parameters and optimizer lie on the host", rare=True)
    two_phase: bool = described(
        False, "hf: teachers and student are never on the device together, teachers come one after the other"
    )
    resume: bool = described(False, "only continue: refuse to begin a run where output_dir holds none")
    overwrite: bool = described(
        False, "begin anew where output_dir already holds a run, which is then lost; else the same command continues it"
    )
    timeout_s: float = described(
        600.0, "how long a rank waits for the others before it gives up", rare=True, unit="seconds", min=1.0
    )
    quiet: bool = described(False, "no progress bar; without a terminal there is none either")
    wandb_project: str = described(
        "", "log to this Weights & Biases project too, which uploads the numbers; empty is off"
    )


@dataclass
class StudentConfig:
    """The model that learns."""

    path: str = described("", "folder of a transformers causal LM and its tokenizer; the tasks make their own")
    trust_remote_code: bool = described(False, "run Python code that lies in the model folders")
    lora_rank: int = described(
        0, "train a LoRA adapter of this rank and nothing else, 0 trains the whole student", min=0
    )
    lora_alpha: float = described(0.0, "its scale is alpha / rank; 0 is twice the rank", rare=True, min=0.0)
    lora_targets: str = described(
        "", "layers it lies on, by the ends of their names, with commas; empty: all linear ones", rare=True
    )
    lora_dropout: float = described(0.0, "dropout before the adapter", rare=True, min=0.0, max=0.99)


@dataclass
class DataConfig:
    """Where the prompts come from."""

    task: str = described(
        "prompts", "a prompts file, or an embedded example", choices=("prompts", "arithmetic", "text")
    )
    prompts: str = described("", "JSONL or parquet file with `prompt`, optional `label`, optional `teacher`")
    eval_prompts: str = described("", "the same for evaluation; empty holds out a part of `prompts`")
    held_out: float = described(0.05, "fraction of `prompts` held out where eval_prompts is empty", min=0.0, max=0.9)
    mixing: str = described(
        "proportional", "how a step's prompts are shared between teachers", choices=("proportional", "equal")
    )
    prompt_key: str = described(
        "prompt", "what the file calls a record's prompt: a text, or messages with role and content"
    )
    messages_key: str = described("messages", "what it calls messages, read where a record has no prompt")
    label_key: str = described(
        "label", "what it calls the right answer: for accuracy and rewards, never for the divergence"
    )
    system_prompt: str = described("", "a system message for messages that have none")
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "more arguments of the chat template, as JSON: '{\"enable_thinking\": false}'"},
    )
    continue_assistant: bool = described(
        False, "messages that end with an assistant's turn are continued; else they are refused"
    )
    max_prompt_tokens: int = described(1024, "longest prompt", unit="tokens", min=1)
    overlong: str = described(
        "refuse",
        "what happens to longer prompts; truncate keeps their ends",
        choices=("refuse", "skip", "truncate"),
    )


@dataclass
class RolloutConfig:
    """How the student writes."""

    prompts: int = described(64, "prompts a step", min=1)
    samples: int = described(1, "completions a prompt", min=1)
    max_new_tokens: int = described(128, "a completion ends here at the latest", unit="tokens", min=1)
    temperature: float = described(1.0, "of sampling; 0 is greedy", min=0.0)
    top_k: int = described(0, "sample among the k likeliest only, 0 is off; on policy means off", min=0)
    top_p: float = described(1.0, "sample within the smallest set of this mass, 1 is off; on policy means off", max=1.0)
    top_logprobs: int = described(
        0,
        'likeliest ids returned with each token; opd.support = "rollout" compares them, and the student makes no pass '
        "before it trains. 0: the sampled token alone",
        min=0,
    )
    batch_size: int = described(512, "completions written at a time", rare=True, min=1)


@dataclass
class OptimizerConfig:
    """AdamW with warm-up, linear decay and clipping."""

    steps: int = described(300, "steps of the run; each draws fresh rollouts", min=0)
    micro_batch: int = described(0, "sequences a forward and backward pass, 0 is all of a step's at once", min=0)
    lr: float = described(1e-5, "peak learning rate", min=0.0)
    min_lr_fraction: float = described(0.0, "what the linear decay ends at, as a fraction of lr", min=0.0, max=1.0)
    warmup_steps: int = described(20, "linear warm-up", unit="steps", min=0)
    weight_decay: float = described(0.0, "decoupled weight decay", min=0.0)
    beta1: float = described(0.9, "AdamW's decay of the mean", rare=True, min=0.0, max=0.9999)
    beta2: float = described(0.95, "AdamW's decay of the square", rare=True, min=0.0, max=0.999999)
    clip: float = described(1.0, "largest gradient norm, 0 is off", min=0.0)


@dataclass
class EvalConfig:
    """Held-out evaluation: greedy accuracy where there are labels, divergence to the teachers, perplexity of texts."""

    every: int = described(
        50, "evaluate each so many steps, and before the first and after the last", unit="steps", min=1
    )
    max_prompts: int = described(512, "held-out prompts a teacher, 0 is all", min=0)
    batch_size: int = described(64, "sequences scored at a time", rare=True, min=1)


@dataclass
class CheckpointConfig:
    """What is kept on disk."""

    every: int = described(100, "write a checkpoint each so many steps, and after the last", unit="steps", min=1)
    keep: int = described(2, "newest checkpoints kept", min=1)


@dataclass
class TrainConfig:
    """All of it. `teachers` maps a name to a folder; its flag is --teacher NAME=DIR, its TOML table [teachers],
    or a table [teachers.NAME] of TeacherSettings.
    """

    run: RunConfig = field(default_factory=RunConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teachers: Teachers = field(default_factory=dict, metadata={"hidden": True})
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    opd: OPDConfig = field(default_factory=OPDConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig, metadata={"rare": True})
    text: TextConfig = field(default_factory=TextConfig, metadata={"rare": True})

    def validate(self, vocab_size: int | None = None) -> None:
        """Refuses what cannot run or cannot distil, before anything is loaded.

        vocab_size: the student's, once it is known
        Raises: ConfigError with the key and the reason.
        """
        try:
            self.opd.validate(vocab_size)
        except ValueError as error:
            raise ConfigError(f"opd.{error}") from error
        if self.data.task == "prompts":
            for key, flag in (("student.path", "--student DIR"), ("data.prompts", "--prompts FILE")):
                if not look_up(self, key):
                    raise ConfigError(f'{key}: wanted a path ({flag}) for data.task = "prompts", got none')
            if not self.teachers:
                raise ConfigError(
                    'teachers: wanted at least one (--teacher NAME=DIR) for data.task = "prompts", got none'
                )
        elif self.teachers:
            raise ConfigError(f'teachers: data.task = "{self.data.task}" makes its own, got {", ".join(self.teachers)}')
        if self.run.wandb_project and not is_installed("wandb"):
            raise ConfigError(
                f"run.wandb_project: got {self.run.wandb_project!r}, and wandb is not installed; run: pip install wandb"
            )
        check_pairs(self)
        check_example(self.data.task, self)
        if self.run.resume and self.run.overwrite:
            raise ConfigError("run.overwrite: wanted without run.resume: one continues a run, the other discards it")
        opd_engine._load()
        from opd_engine.train.backends import backend, check_capabilities

        check_capabilities(self, backend(self.run.backend).CAPABILITIES)

    def require_packages(self) -> None:
        """Refuses to begin without the optional packages that these settings need. Raises: MissingPackageError."""
        require("train", EXTRAS["train"], "opd-engine train")
        if self.run.backend == "megatron":
            require("megatron", EXTRAS["megatron"], 'run.backend = "megatron"')
        for key in ("data.prompts", "data.eval_prompts"):
            if look_up(self, key).endswith(".parquet"):
                require("train", ("pyarrow",), f"{key} = {show(look_up(self, key))}")


def all_settings() -> list[Setting]:
    """Every key but [teachers], in the order of the sections."""
    return leaves(TrainConfig)


def _tables() -> list[str]:
    """The settings whose value is a table."""
    return [setting.key for setting in all_settings() if setting.kind is dict]


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises: ConfigError where there is no such file, or it is not TOML (with the line).
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def apply_toml(config: TrainConfig, tables: Mapping[str, Any], where: str) -> None:
    """Sets what the tables say. Mutates: config.

    Raises: ConfigError for an unknown key (with the nearest known one), a wrong type or a value out of range.
    """
    known = {setting.key: setting for setting in all_settings()}
    teachers = tables.get("teachers", {})
    if not isinstance(teachers, Mapping):
        raise ConfigError(f'{where}: teachers: wanted a table of NAME = "DIR", got {teachers!r}')
    for name, directory in teachers.items():
        config.teachers[name] = read_teacher(name, directory, where)
    for key, value in flatten_tables(tables, ("teachers",), _tables()).items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key}{nearest(key, [*known, 'teachers'])}")
        assign(config, key, check_value(known[key], value, f"{where}: "))


def apply_flags(config: TrainConfig, flags: argparse.Namespace) -> None:
    """Sets what the command line says, over the file. Mutates: config."""
    given = vars(flags)
    for setting in all_settings():
        if setting.key in given:
            value = parse_text(setting, given[setting.key])
            assign(config, setting.key, check_value(setting, value, "--"))
    if config.run.resume and "run.resume" in given and "run.overwrite" not in given:
        config.run.overwrite = False  # the file's answer for a run begun anew
    named: dict[str, str] = {}
    for entry in given.get("teacher") or []:
        name, separator, directory = entry.partition("=")
        if not (name and separator and directory):
            raise ConfigError(f"--teacher: wanted NAME=DIR, got {entry!r}")
        if name in named:
            raise ConfigError(
                f"--teacher: {name!r} is given twice, {named[name]!r} and {directory!r}; wanted one folder a name"
            )
        named[name] = directory
        config.teachers[name] = with_path(config.teachers.get(name), directory)


# A resumed run may change these: they steer when things are written or shown, not what is computed.
_FREE_ON_RESUME = (
    "run.",
    "eval.",
    "checkpoint.",
    "arithmetic.reuse_teachers",
    "arithmetic.cache_dir",
    "text.reuse_teachers",
    "text.cache_dir",
)
_FIXED_ON_RESUME = ("run.seed", "run.dtype", "run.device", "run.backend")


def differences(saved: TrainConfig, given: TrainConfig) -> list[str]:
    """What a resumed run would compute differently from the saved one: "key: saved X, given Y" for each."""
    found = []
    for setting in all_settings():
        free = setting.key.startswith(_FREE_ON_RESUME) and setting.key not in _FIXED_ON_RESUME
        before, after = look_up(saved, setting.key), look_up(given, setting.key)
        if not free and before != after:
            found.append(f"{setting.key}: saved {show(before)}, given {show(after)}")
    before, after = ({n: settings_of(t) for n, t in config.teachers.items()} for config in (saved, given))
    if before != after:
        found.append(f"teachers: saved {saved.teachers}, given {given.teachers}")
    return found


def config_to_toml(config: TrainConfig) -> str:
    """The whole configuration as TOML, as it is kept beside a run."""
    text = to_toml(config, all_settings())
    text += teachers_to_toml(config.teachers)
    return text


def config_from_toml(path: str | Path) -> TrainConfig:
    """A configuration from a file alone; validated by the caller."""
    config = TrainConfig()
    apply_toml(config, read_toml(path), str(path))
    return config


def section_as_dict(section: Any) -> dict[str, Any]:
    """A section as plain values, for hashing and for the summary."""
    return dataclasses.asdict(section)


def unknown_flag_error(arguments: Sequence[str]) -> ConfigError:
    """For what argparse did not know: the flag and the nearest known one."""
    known = [setting.key for setting in all_settings()] + ["teacher", "student", "prompts", "resume", "tp", "overwrite"]
    name = arguments[0].lstrip("-").split("=")[0]
    return ConfigError(
        f"unknown argument {arguments[0]}{nearest(name, known).replace('did you mean ', 'did you mean --')}"
    )

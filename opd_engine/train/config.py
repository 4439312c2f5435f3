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
from opd_engine.train.settings import (
    ConfigError,
    Setting,
    assign,
    check_value,
    flatten_tables,
    leaves,
    look_up,
    nearest,
    parse_text,
    show,
    to_toml,
)


def _field(default: Any, help_text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class RunConfig:
    """Where and how the run happens."""

    output_dir: str = _field("runs/train", "folder for checkpoints, metrics, plots and the summary")
    seed: int = _field(0, "seed of the data order, the rollouts and what is made from nothing", min=0)
    threads: int = _field(0, "torch's intra-op threads, 0 leaves torch's default; tiny models want 1", min=0)
    device: str = _field("cpu", "where the models live, as torch names it: cpu, cuda, cuda:1")
    dtype: str = _field("float32", "of the parameters", choices=("float32", "float64", "bfloat16", "float16"))
    backend: str = _field(
        "hf", "what trains the student: transformers here, or megatron-core", choices=("hf", "megatron")
    )
    tp: int = _field(1, "ranks that share the LM head, and with megatron every layer", unit="processes", min=1)
    pp: int = _field(1, "megatron: pipeline stages", unit="processes", min=1)
    cp: int = _field(1, "megatron: ranks that share a sequence", unit="processes", min=1)
    teacher_weights: str = _field(
        "auto",
        "teachers of the student's shape take its place in turn (switch, megatron's choice where it can), or each is a "
        "module of its own, on the host between turns (staged) or always on the device (resident, the choice of hf)",
        choices=("auto", "switch", "staged", "resident"),
    )
    workspace_bytes: int = _field(
        0,
        "logits that exist at a time; the LM head then works in chunks and gives its gradients with the loss, 0 makes "
        "the logits of all rows that count",
        unit="bytes",
        min=0,
    )
    recompute: str = _field(
        "none",
        "megatron: what the backward computes again instead of keeping: attention's scores (selective), or all of a "
        "layer but its input (full)",
        choices=("none", "selective", "full"),
    )
    resume: bool = _field(False, "only continue: refuse to begin a run where output_dir holds none")
    overwrite: bool = _field(
        False, "begin anew where output_dir already holds a run, which is then lost; else the same command continues it"
    )
    timeout_s: float = _field(600.0, "how long a rank waits for the others before it gives up", unit="seconds", min=1.0)
    quiet: bool = _field(False, "no progress bar; without a terminal there is none either")
    wandb_project: str = _field("", "log to this Weights & Biases project too, which uploads the numbers; empty is off")


@dataclass
class StudentConfig:
    """The model that learns."""

    path: str = _field("", "folder of a transformers causal LM and its tokenizer; the tasks make their own")
    trust_remote_code: bool = _field(False, "run Python code that lies in the model folders")


@dataclass
class DataConfig:
    """Where the prompts come from."""

    task: str = _field("prompts", "a prompts file, or an embedded example", choices=("prompts", "arithmetic", "text"))
    prompts: str = _field("", "JSONL or parquet file with `prompt`, optional `label`, optional `teacher`")
    eval_prompts: str = _field("", "the same for evaluation; empty holds out a part of `prompts`")
    held_out: float = _field(0.05, "fraction of `prompts` held out where eval_prompts is empty", min=0.0, max=0.9)
    mixing: str = _field(
        "proportional", "how a step's prompts are shared between teachers", choices=("proportional", "equal")
    )
    max_prompt_tokens: int = _field(1024, "longer prompts are refused", unit="tokens", min=1)


@dataclass
class RolloutConfig:
    """How the student writes."""

    prompts: int = _field(64, "prompts a step", min=1)
    samples: int = _field(1, "completions a prompt", min=1)
    max_new_tokens: int = _field(128, "a completion ends here at the latest", unit="tokens", min=1)
    temperature: float = _field(1.0, "of sampling; 0 is greedy", min=0.0)
    top_k: int = _field(0, "sample among the k likeliest only, 0 is off; on policy means off", min=0)
    top_p: float = _field(1.0, "sample within the smallest set of this mass, 1 is off; on policy means off", max=1.0)
    top_logprobs: int = _field(
        0,
        'likeliest ids returned with each token; opd.support = "rollout" compares them, and the student makes no pass '
        "before it trains. 0: the sampled token alone",
        min=0,
    )
    batch_size: int = _field(512, "completions written at a time", min=1)


@dataclass
class OptimizerConfig:
    """AdamW with warm-up, linear decay and clipping."""

    steps: int = _field(300, "steps of the run; each draws fresh rollouts", min=0)
    micro_batch: int = _field(0, "sequences a forward and backward pass, 0 is all of a step's at once", min=0)
    lr: float = _field(1e-5, "peak learning rate", min=0.0)
    min_lr_fraction: float = _field(0.0, "what the linear decay ends at, as a fraction of lr", min=0.0, max=1.0)
    warmup_steps: int = _field(20, "linear warm-up", unit="steps", min=0)
    weight_decay: float = _field(0.0, "decoupled weight decay", min=0.0)
    beta1: float = _field(0.9, "AdamW's decay of the mean", min=0.0, max=0.9999)
    beta2: float = _field(0.95, "AdamW's decay of the square", min=0.0, max=0.999999)
    clip: float = _field(1.0, "largest gradient norm, 0 is off", min=0.0)


@dataclass
class EvalConfig:
    """Held-out evaluation: greedy accuracy where there are labels, divergence to the teachers, perplexity of texts."""

    every: int = _field(50, "evaluate each so many steps, and before the first and after the last", unit="steps", min=1)
    max_prompts: int = _field(512, "held-out prompts a teacher, 0 is all", min=0)
    batch_size: int = _field(64, "sequences scored at a time", min=1)


@dataclass
class CheckpointConfig:
    """What is kept on disk."""

    every: int = _field(100, "write a checkpoint each so many steps, and after the last", unit="steps", min=1)
    keep: int = _field(2, "newest checkpoints kept", min=1)


@dataclass
class ModelShape:
    """Size of a small Qwen3 with tied embeddings."""

    hidden_size: int = _field(64, "width of the hidden states", min=8)
    num_layers: int = _field(2, "transformer layers", min=1)
    num_heads: int = _field(4, "attention heads", min=1)
    head_dim: int = _field(16, "width of one head", min=2)
    feed_forward_size: int = _field(256, "width of the feed-forward layers", min=8)


@dataclass
class Supervision:
    """How a small model is trained on sequences before anything is distilled."""

    steps: int = _field(500, "optimizer steps", min=0)
    batch_size: int = _field(128, "sequences a step", min=1)
    lr: float = _field(4e-3, "peak learning rate", min=0.0)
    label_smoothing: float = _field(0.1, "target mass spread over all ids", min=0.0, max=0.999)
    warmup_steps: int = _field(20, "linear warm-up", unit="steps", min=0)


@dataclass
class ArithmeticConfig:
    """The embedded default: one teacher adds, one subtracts, a weak student knows a little of both."""

    operand_end: int = _field(50, "operands are 0 to operand_end - 1", min=2, max=100)
    held_out: float = _field(0.1, "fraction of the pairs that nobody trains on", min=0.01, max=0.9)
    reuse_teachers: bool = _field(True, "reuse models made earlier by the same settings")
    cache_dir: str = _field("runs/cache", "folder of the models that are made")
    swap_teachers: bool = _field(False, "control: each task is scored by the other's teacher")
    model: ModelShape = field(default_factory=ModelShape)
    teacher: Supervision = field(default_factory=Supervision)
    student: Supervision = field(default_factory=lambda: Supervision(steps=150, lr=2e-3))


@dataclass
class TextConfig:
    """The second example: English prose from CPython's own documentation, a teacher and a smaller student."""

    vocab_size: int = _field(4096, "size of the BPE vocabulary trained on the text", min=300, max=65536)
    held_out: float = _field(0.1, "fraction of the passages that nobody trains on", min=0.01, max=0.9)
    passage_tokens: int = _field(64, "length of a passage", unit="tokens", min=8)
    prompt_tokens: int = _field(16, "length of the beginning used as a prompt", unit="tokens", min=1)
    reuse_teachers: bool = _field(True, "reuse models made earlier by the same settings")
    cache_dir: str = _field("runs/cache", "folder of the models that are made")
    teacher_model: ModelShape = field(
        default_factory=lambda: ModelShape(
            hidden_size=192, num_layers=3, num_heads=4, head_dim=48, feed_forward_size=768
        )
    )
    student_model: ModelShape = field(
        default_factory=lambda: ModelShape(
            hidden_size=96, num_layers=2, num_heads=4, head_dim=24, feed_forward_size=384
        )
    )
    teacher: Supervision = field(
        default_factory=lambda: Supervision(steps=800, batch_size=32, lr=3e-3, label_smoothing=0.0)
    )
    student: Supervision = field(
        default_factory=lambda: Supervision(steps=60, batch_size=32, lr=2e-3, label_smoothing=0.0)
    )


@dataclass
class TrainConfig:
    """All of it. `teachers` maps a name to a folder; its flag is --teacher NAME=DIR, its TOML table [teachers]."""

    run: RunConfig = field(default_factory=RunConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teachers: dict[str, str] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    opd: OPDConfig = field(default_factory=OPDConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)
    text: TextConfig = field(default_factory=TextConfig)

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
        if self.rollout.top_logprobs and self.opd.support != "rollout":
            raise ConfigError(
                f'rollout.top_logprobs: wanted 0 for opd.support = "{self.opd.support}", got '
                f'{self.rollout.top_logprobs}; only opd.support = "rollout" reads them'
            )
        if not 0.0 < self.rollout.top_p <= 1.0:
            raise ConfigError(f"rollout.top_p: wanted above 0 and at most 1, got {self.rollout.top_p}")
        cut = [key for key, off in (("top_k", 0), ("top_p", 1.0)) if getattr(self.rollout, key) != off]
        other = cut or self.rollout.temperature != self.opd.temperature
        if other and (self.opd.loss_type == "advantage" or self.opd.policy_coefficient > 0):
            what = "opd.loss_type 'advantage' cannot distil"
            if self.opd.loss_type != "advantage":
                what = "opd.policy_coefficient: the ratios of an unchanged policy are not 1"
            raise ConfigError(
                f"{what} with rollouts of another distribution than the student's: "
                f"wanted rollout.temperature = opd.temperature = {self.opd.temperature}, rollout.top_k and top_p off, "
                f"got temperature {self.rollout.temperature}, top_k {self.rollout.top_k}, top_p {self.rollout.top_p}"
            )
        if self.data.task == "text" and self.text.prompt_tokens >= self.text.passage_tokens:
            raise ConfigError(
                f"text.prompt_tokens: wanted less than text.passage_tokens = {self.text.passage_tokens}, "
                f"got {self.text.prompt_tokens}"
            )
        if self.run.resume and self.run.overwrite:
            raise ConfigError("run.overwrite: wanted without run.resume: one continues a run, the other discards it")
        self._require_packages()
        opd_engine._load()
        from opd_engine.train.backends import backend, check_capabilities

        check_capabilities(self, backend(self.run.backend).CAPABILITIES)

    def _require_packages(self) -> None:
        require("train", EXTRAS["train"], "opd-engine train")
        if self.run.backend == "megatron":
            require("megatron", EXTRAS["megatron"], 'run.backend = "megatron"')
        for key in ("data.prompts", "data.eval_prompts"):
            if look_up(self, key).endswith(".parquet"):
                require("train", ("pyarrow",), f"{key} = {show(look_up(self, key))}")


def all_settings() -> list[Setting]:
    """Every key but [teachers], in the order of the sections."""
    return leaves(TrainConfig)


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
        if not isinstance(directory, str):
            raise ConfigError(f"{where}: teachers.{name}: wanted a path, got {directory!r}")
        config.teachers[name] = directory
    for key, value in flatten_tables(tables, stop=("teachers",)).items():
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
    for entry in given.get("teacher") or []:
        name, separator, directory = entry.partition("=")
        if not (name and separator and directory):
            raise ConfigError(f"--teacher: wanted NAME=DIR, got {entry!r}")
        config.teachers[name] = directory


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
    if saved.teachers != given.teachers:
        found.append(f"teachers: saved {saved.teachers}, given {given.teachers}")
    return found


def config_to_toml(config: TrainConfig) -> str:
    """The whole configuration as TOML, as it is kept beside a run."""
    text = to_toml(config, all_settings())
    if config.teachers:
        text += (
            "\n[teachers]\n"
            + "\n".join(f"{show(name)} = {show(path)}" for name, path in config.teachers.items())
            + "\n"
        )
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

"""The sections [arithmetic] and [text] of the embedded examples: what their models and data are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opd_engine.train.settings import ConfigError, described


@dataclass
class ModelShape:
    """Size of a small Qwen3 with tied embeddings."""

    hidden_size: int = described(64, "width of the hidden states", min=8)
    num_layers: int = described(2, "transformer layers", min=1)
    num_heads: int = described(4, "attention heads", min=1)
    head_dim: int = described(16, "width of one head", min=2)
    feed_forward_size: int = described(256, "width of the feed-forward layers", min=8)


@dataclass
class Supervision:
    """How a small model is trained on sequences before anything is distilled."""

    steps: int = described(500, "optimizer steps", min=0)
    batch_size: int = described(128, "sequences a step", min=1)
    lr: float = described(4e-3, "peak learning rate", min=0.0)
    label_smoothing: float = described(0.1, "target mass spread over all ids", min=0.0, max=0.999)
    warmup_steps: int = described(20, "linear warm-up", unit="steps", min=0)


@dataclass
class ArithmeticConfig:
    """The embedded default: one teacher adds, one subtracts, a weak student knows a little of both."""

    operand_end: int = described(50, "operands are 0 to operand_end - 1", min=2, max=100)
    held_out: float = described(0.1, "fraction of the pairs that nobody trains on", min=0.01, max=0.9)
    reuse_teachers: bool = described(True, "reuse models made earlier by the same settings")
    cache_dir: str = described("runs/cache", "folder of the models that are made")
    swap_teachers: bool = described(False, "control: each task is scored by the other's teacher")
    model: ModelShape = field(default_factory=ModelShape)
    teacher: Supervision = field(default_factory=Supervision)
    student: Supervision = field(default_factory=lambda: Supervision(steps=150, lr=2e-3))


@dataclass
class TextConfig:
    """The second example: English prose from CPython's own documentation, a teacher and a smaller student."""

    vocab_size: int = described(4096, "size of the BPE vocabulary trained on the text", min=300, max=65536)
    held_out: float = described(0.1, "fraction of the passages that nobody trains on", min=0.01, max=0.9)
    passage_tokens: int = described(64, "length of a passage", unit="tokens", min=8)
    prompt_tokens: int = described(16, "length of the beginning used as a prompt", unit="tokens", min=1)
    reuse_teachers: bool = described(True, "reuse models made earlier by the same settings")
    cache_dir: str = described("runs/cache", "folder of the models that are made")
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


def check_example(task: str, config: Any) -> None:
    """Raises: ConfigError for an example's settings that contradict each other. config: has its section."""
    if task == "text" and config.text.prompt_tokens >= config.text.passage_tokens:
        raise ConfigError(
            f"text.prompt_tokens: wanted less than text.passage_tokens = {config.text.passage_tokens}, "
            f"got {config.text.prompt_tokens}"
        )

"""What a Hugging Face config.json says of a dense Qwen3 or Llama: sizes, head, rope; and the published sizes by name.

Only what changes the arithmetic is kept. Everything a config may say that is not built here is refused by its name, so
that no model runs with other positions, biases or windows than it was trained with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FAMILIES = ("qwen3", "llama")
"""model_type of config.json. Qwen3 normalises queries and keys a head, Llama does not."""

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
}
_ROPE_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True)
class Rope:
    """Rotary positions. settings: what config.json says of the kind, sorted."""

    theta: float
    kind: str = "default"
    settings: tuple[tuple[str, float], ...] = ()

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """[head_dim / 2] float32, radians a position."""
        frequencies = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        said = dict(self.settings)
        if self.kind == "linear":
            return frequencies / said["factor"]
        if self.kind == "llama3":
            # Short waves stay, long ones are stretched, those between are mixed.
            waves = 2 * math.pi / frequencies
            low, high = said["low_freq_factor"], said["high_freq_factor"]
            share = ((said["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0.0, 1.0)
            return (1 - share) * frequencies / said["factor"] + share * frequencies
        if self.kind == "yarn":
            first, last = (
                head_dim
                * math.log(said["original_max_position_embeddings"] / (turns * 2 * math.pi))
                / (2 * math.log(self.theta))
                for turns in (said["beta_fast"], said["beta_slow"])
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
            places = torch.arange(head_dim // 2, dtype=torch.float32)
            share = 1 - ((places - first) / max(last - first, 1e-3)).clamp(0.0, 1.0)
            return frequencies / said["factor"] * (1 - share) + frequencies * share
        return frequencies

    @property
    def yarn_factor(self) -> float | None:
        """What YaRN stretches by, from which Megatron derives the factor on cosine and sine; None without YaRN."""
        return dict(self.settings)["factor"] if self.kind == "yarn" else None


@dataclass(frozen=True)
class GPTShape:
    """The architecture of one dense decoder.

    head_dim: channels a head; num_query_groups: key and value heads
    tied: the output layer is the embedding
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    rms_norm_eps: float
    rope: Rope
    tied: bool
    max_position_embeddings: int

    @classmethod
    def read(cls, folder: str | Path, *, argument: str) -> GPTShape:
        """From a folder's config.json. Raises: ValueError where there is none, and as from_config."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"{argument}: wanted a folder with a config.json, got {str(folder)!r} without one")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{argument}: {path} does not read as JSON ({error})") from error
        return cls.from_config(config, argument=f"{argument}: {path}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, argument: str) -> GPTShape:
        """From what a config.json holds.

        Raises: ValueError naming the key: another family, a missing size, or something that is not built here.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"{argument}: model_type: wanted one of {', '.join(FAMILIES)}, got {family!r}")
        layer_types = set(config.get("layer_types") or ["full_attention"])
        for name, value, wanted in (
            ("attention_bias", config.get("attention_bias", False), False),
            ("mlp_bias", config.get("mlp_bias", False), False),
            ("use_sliding_window", config.get("use_sliding_window", False), False),
            ("layer_types", sorted(layer_types), ["full_attention"]),
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("quantization_config", config.get("quantization_config"), None),
        ):
            if value != wanted:
                raise ValueError(f"{argument}: {name}: wanted {wanted!r}, got {value!r}")
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        )
        for name in sizes:
            if not isinstance(config.get(name), int) or config[name] < 1:
                raise ValueError(f"{argument}: {name}: wanted a positive integer, got {config.get(name)!r}")
        heads = config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        if heads % groups:
            raise ValueError(f"{argument}: num_key_value_heads: wanted a divisor of {heads} heads, got {groups}")
        return cls(
            family=family,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_query_groups=groups,
            head_dim=config.get("head_dim") or (128 if family == "qwen3" else config["hidden_size"] // heads),
            ffn_hidden_size=config["intermediate_size"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=_read_rope(config, argument),
            tied=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=config["max_position_embeddings"],
        )

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised, head by head."""
        return self.family == "qwen3"

    def padded_vocab_size(self, tp_size: int, multiple: int = 128) -> int:
        """Megatron's width of the embedding: a multiple of 128 x tp_size."""
        step = multiple * tp_size
        return -(-self.vocab_size // step) * step


def _read_rope(config: Mapping[str, Any], argument: str) -> Rope:
    """From both ways of writing it: rope_theta beside rope_scaling, and rope_parameters, which newer files have."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = said.get("rope_type", said.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise ValueError(f"{argument}: rope_type: wanted one of {', '.join(_ROPE_KEYS)}, got {kind!r}")
    settings = {}
    for key in _ROPE_KEYS[kind]:
        value = said.get(key, _ROPE_DEFAULTS.get(key))
        if value is None and key == "original_max_position_embeddings":
            value = config["max_position_embeddings"]
        if not isinstance(value, (int, float)):
            raise ValueError(f"{argument}: rope_type {kind!r}: {key}: wanted a number, got {value!r}")
        settings[key] = float(value)
    for key, plain in (
        ("partial_rotary_factor", 1.0),
        ("attention_factor", None),
        ("mscale", None),
        ("mscale_all_dim", None),
        ("truncate", True),
    ):
        value = said.get(key, config.get(key))
        if value is not None and value != plain:
            raise ValueError(f"{argument}: {key}: wanted {plain} or none, got {value!r}")
    theta = said.get("rope_theta", config.get("rope_theta", 10000.0))
    return Rope(float(theta), kind, tuple(sorted(settings.items())))


def _qwen3(hidden: int, layers: int, heads: int, ffn: int, *, tied: bool) -> GPTShape:
    return GPTShape("qwen3", 151_936, hidden, layers, heads, 8, 128, ffn, 1e-6, Rope(1e6), tied, 40_960)


def _llama3(hidden: int, layers: int, heads: int, head_dim: int, ffn: int, factor: float, *, tied: bool) -> GPTShape:
    rope = {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192.0,
    }
    scaled = Rope(5e5, "llama3", tuple(sorted(rope.items())))
    return GPTShape("llama", 128_256, hidden, layers, heads, 8, head_dim, ffn, 1e-5, scaled, tied, 131_072)


PUBLISHED = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288, tied=False),
    "qwen3-14b": _qwen3(5120, 40, 40, 17_408, tied=False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600, tied=False),
    "llama-3.2-1b": _llama3(2048, 16, 32, 64, 8192, 32.0, tied=True),
    "llama-3.2-3b": _llama3(3072, 28, 24, 128, 8192, 32.0, tied=True),
    "llama-3.1-8b": _llama3(4096, 32, 32, 128, 14_336, 8.0, tied=False),
    "llama-3.1-70b": _llama3(8192, 80, 64, 128, 28_672, 8.0, tied=False),
    "llama-3.3-70b": _llama3(8192, 80, 64, 128, 28_672, 8.0, tied=False),
}
"""The dense models' sizes as published, for plans before anything is downloaded."""

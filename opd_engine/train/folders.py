"""Model folders looked at before anything is loaded: from their file names and config.json, named as what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_engine.train.settings import ConfigError

if TYPE_CHECKING:
    from opd_engine.distillation.actor import Capabilities

ADAPTER = "adapter_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json", "tekken.json")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_BALANCING = ("router_aux_loss_coef", "aux_loss_alpha", "moe_aux_loss_coeff", "router_z_loss_coef")

# Families whose positions are rows of a table: there is nothing for one more.
_LEARNED = ("gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "openai-gpt")


def read_config(folder: str | Path, argument: str) -> dict[str, Any]:
    """A model folder's config.json.

    argument: the setting that names the folder, for messages
    Raises: ConfigError where the folder is none, or holds something else than a causal LM.
    """
    path = Path(folder).expanduser()
    if path.is_file():
        raise ConfigError(f"{argument}: wanted a model's folder, got the file {str(folder)!r}")
    if not path.is_dir():
        raise ConfigError(f"{argument}: wanted a model's folder, got {str(folder)!r}, which is not one")
    if not (path / "config.json").is_file():
        what = (
            "an adapter's folder, without its model" if (path / ADAPTER).is_file() else "a folder without config.json"
        )
        raise ConfigError(f"{argument}: wanted a causal LM's folder, got {what}: {str(folder)!r}")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{argument}: {str(path / 'config.json')!r} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{argument}: {str(path / 'config.json')!r}: wanted an object, got {type(config).__name__}")
    return config


def check_model_folder(folder: str | Path, argument: str, *, adapters: bool = False) -> dict[str, Any] | None:
    """Refuse what is no causal LM with a tokenizer beside it.

    adapters: an adapter's folder is fine too

    Returns: its config.json; None of an adapter.
    Raises: ConfigError that names what the folder is.
    """
    path = Path(folder).expanduser()
    if adapters and (path / ADAPTER).is_file() and not (path / "config.json").is_file():
        return None
    config = read_config(folder, argument)
    names = [name for name in config.get("architectures") or () if isinstance(name, str)]
    kind = names[0] if names else str(config.get("model_type", "a model"))
    if config.get("is_encoder_decoder"):
        raise ConfigError(f"{argument}: wanted a causal LM, got an encoder and decoder ({kind}) in {str(folder)!r}")
    if names and not any(_writes(name) for name in names):
        raise ConfigError(f"{argument}: wanted a causal LM, got {kind} in {str(folder)!r}, which does not write text")
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise ConfigError(
            f"{argument}: {str(folder)!r} holds no tokenizer ({_TOKENIZERS[0]} or the like); save it there too: "
            "tokenizer.save_pretrained(folder)"
        )
    return config


def _writes(architecture: str) -> bool:
    ends = (
        "ForCausalLM",
        "LMHeadModel",
        "LMHead",
        "ForConditionalGeneration",
        "ForMultimodalLM",
        "ForCausalMultimodal",
    )
    return architecture.endswith(ends) and not architecture.startswith(("Bert", "Roberta", "Electra", "CamemBert"))


def balancing_loss(config: Mapping[str, Any], folder: str | Path) -> tuple[str, float] | None:
    """(key, coefficient) of the loss that balances a model's experts; None without experts, or where it is 0."""
    for section in (config, config.get("text_config") or {}):
        if not any(isinstance(section.get(name), int) and section[name] > 1 for name in _EXPERTS):
            continue
        given = {name: section[name] for name in _BALANCING if isinstance(section.get(name), (int, float))}
        if not given:
            given = _defaults(folder)
        return next(((name, float(value)) for name, value in given.items() if value), None)
    return None


def _defaults(folder: str | Path) -> dict[str, float]:
    """What transformers fills in where config.json is silent."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except Exception:  # a model that this transformers does not know is refused where it is loaded, with the reason
        return {}
    return {name: value for name in _BALANCING if isinstance(value := getattr(config, name, None), (int, float))}


def check_balancing(config: Mapping[str, Any], folder: str | Path, argument: str, can: Capabilities) -> None:
    """Raises: ConfigError for a student whose balancing loss would be left out in silence."""
    found = balancing_loss(config, folder)
    if found is not None and not can.mixture_of_experts:
        key, value = found
        raise ConfigError(
            f"{argument}: {str(folder)!r} has experts and a loss that balances them ({key} = {value:g}), which is not "
            f"computed by the {can.actor} actor: its experts would drift apart; set {key} to 0 in its config.json to "
            "train without it"
        )


def check_positions(config: Mapping[str, Any], argument: str, longest: int, max_new_tokens: int) -> None:
    """Raises: ConfigError where the longest prompt and its answer have no place among a model's learned positions."""
    limit = next((config[name] for name in ("max_position_embeddings", "n_positions") if name in config), None)
    if config.get("model_type") in _LEARNED and isinstance(limit, int) and longest + max_new_tokens > limit:
        raise ConfigError(
            f"{argument}: wanted a model of at least {longest + max_new_tokens} positions, for the longest prompt's "
            f"{longest} tokens and rollout.max_new_tokens = {max_new_tokens}, got {limit}; shorten one of the two "
            "(data.max_prompt_tokens, data.overlong)"
        )

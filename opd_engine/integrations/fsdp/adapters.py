"""LoRA students and teachers through peft: only adapters train, the base stays bit for bit, a folder names its base.

Weights are read from safetensors alone. What peft would pass over in silence (a target that no module has, a tensor
that fits nowhere, another base) is refused by name.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from opd_engine.parallel.tensors import whole_tensor
from opd_engine.teachers.fingerprint import fingerprint

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "opd_base.json"
_SHOWN = 4


def adapted_model(model: nn.Module) -> PeftModel | None:
    """The model, where it is one of peft's."""
    peft = sys.modules.get("peft")
    return model if peft is not None and isinstance(model, peft.PeftModel) else None


def add_adapter(
    model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str], dropout: float = 0.0
) -> PeftModel:
    """A LoRA adapter on a causal LM, which alone trains from now on; it begins as no change.

    targets: ends of module names ("q_proj", "mlp.up_proj"); each must be the end of at least one
    Raises: ValueError for sizes out of range, targets that no module has, or a tied LM head among them.
    """
    peft = _peft()
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: wanted a whole number >= 1, got {rank!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: wanted 0 <= dropout < 1, got {dropout!r}")
    check_targets(model, targets)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def check_targets(model: PreTrainedModel, targets: Sequence[str] | str, argument: str = "targets") -> None:
    """Raises: ValueError for targets that no module has, or that reach an LM head tied to the embedding."""
    if isinstance(targets, str):  # peft reads it as a pattern, or as "all-linear", which leaves the head out
        return
    if not targets:
        raise ValueError(f"{argument}: wanted at least one, got none")
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"{argument}: no module of {type(model).__name__} is called {target!r}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    ends = [name for name, module in model.named_modules() if module is head or module is embedding]
    if tied and any(name == target or name.endswith(f".{target}") for name in ends for target in targets):
        raise ValueError(
            f"{argument}: wanted none of {', '.join(ends)}, whose weight is one: merging an adapter on either would "
            "change the other too"
        )


def load_adapter(model: PreTrainedModel, folder: str | Path, *, trains: bool, argument: str = "folder") -> PeftModel:
    """An adapter folder on its base.

    trains: whether the adapter is to be trained on
    Raises: ValueError for a folder that is none or holds pickled weights, another base, modules or tensors that the
        model does not have, shapes that differ.
    """
    peft, folder = _peft(), Path(folder)
    held = _held(folder, argument)
    config = peft.PeftConfig.from_pretrained(str(folder))
    check_targets(model, sorted(config.target_modules or ()), f"{argument}: target_modules")
    check_targets_saved(model, config, argument)
    _check_base(model, folder, argument)
    adapted = peft.PeftModel(model, config)
    own = peft.get_peft_model_state_dict(adapted)
    for what, names in (("lacks", sorted(set(own) - set(held))), ("has unknown", sorted(set(held) - set(own)))):
        if names:
            shown = ", ".join(names[:_SHOWN])
            raise ValueError(f"{argument}: {str(folder)!r} is not of this base: it {what} {shown}, {len(names)} in all")
    for name, tensor in own.items():
        if list(tensor.shape) != held[name]:
            raise ValueError(
                f"{argument}: {str(folder)!r} is not of this base: {name}: wanted {list(tensor.shape)}, "
                f"got {held[name]}"
            )
    _copy_in(adapted, folder)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(trains and "lora_" in name)
    return adapted.eval()


def check_targets_saved(model: PreTrainedModel, config, argument: str) -> None:
    """Whole modules that an adapter replaces are no adapter."""
    if config.modules_to_save:
        raise ValueError(f"{argument}: modules_to_save: wanted none, got {sorted(config.modules_to_save)}")


def merged(adapted: PeftModel) -> PreTrainedModel:
    """A plain model of base and adapter, for a teacher that is only looked at. Mutates: the base, which it takes."""
    return adapted.merge_and_unload().requires_grad_(False).eval()


def is_adapter(folder: str | Path) -> bool:
    """Whether the folder holds an adapter, and no model."""
    return (Path(folder) / CONFIG).is_file()


def base_of(folder: str | Path, argument: str = "folder") -> Path:
    """The folder of the model that an adapter was made for.

    Raises: ValueError where it names none that is there.
    """
    named = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named or not Path(named).is_dir():
        raise ValueError(f"{argument}: wanted an adapter whose base is a folder that is there, got base {named!r}")
    return Path(named)


def base_content(model: nn.Module) -> str:
    """A number of the base's weights, whatever adapter lies on them and in whichever dtype it is held.

    Communicates: an all-gather of each weight, of a sharded model.
    """
    whole: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            whole[name.replace(".base_layer.", ".")] = parameter.detach()
    total = 0
    for number in fingerprint(whole_tensor(whole[name]).to(torch.bfloat16) for name in sorted(whole)).tolist():
        total = (total * 0x9E3779B97F4A7C15 + number + 1) % (1 << 64)
    return f"{total:016x}"


def _peft() -> ModuleType:
    """Raises: ValueError where it is not installed, with what installs it."""
    try:
        return importlib.import_module("peft")
    except ModuleNotFoundError as missing:
        raise ValueError("adapter: needs peft, which is not installed: pip install 'opd_engine[lora]'") from missing


def _held(folder: Path, argument: str) -> dict[str, list[int]]:
    from safetensors import safe_open

    if not (folder / CONFIG).is_file():
        raise ValueError(f"{argument}: wanted an adapter folder with a {CONFIG}, got {str(folder)!r} without one")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{argument}: wanted {WEIGHTS} in {str(folder)!r}; pickled weights are not read")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _copy_in(adapted: PeftModel, folder: Path) -> None:
    from safetensors.torch import load_file

    _peft().set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS))


def _check_base(model: PreTrainedModel, folder: Path, argument: str) -> None:
    """By content where one of our checkpoints says it, by its configuration where the named base is there."""
    if (folder / BASE).is_file():
        said = json.loads((folder / BASE).read_text(encoding="utf-8"))["content"]
        own = base_content(model)
        if said != own:
            raise ValueError(f"{argument}: {str(folder)!r} is of another base: wanted content {said}, got {own}")
        return
    named = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    path = None if not named else Path(named) / "config.json"
    if path is None or not path.is_file():
        return
    theirs, ours = json.loads(path.read_text(encoding="utf-8")), model.config.to_dict()
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
        if key in theirs and key in ours and theirs[key] != ours[key]:
            raise ValueError(
                f"{argument}: {str(folder)!r} is of another base, {named!r}: {key} there {theirs[key]!r}, "
                f"here {ours[key]!r}"
            )

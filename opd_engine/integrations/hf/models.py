"""Models and tokenizers from directories: safetensors only, no code from the directory unless the user asks.

Nothing here reaches a hub: a path that is not a directory is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opd_engine.teachers.checkpoint_files import check_safetensors_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What configurations call their number of positions; transformers maps older names to the first.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name` ("float32", "float64", "bfloat16", "float16").

    Raises: ValueError for any other name.
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype: wanted one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def _directory(path: str | Path, argument: str, needed: str | None = None) -> Path:
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ValueError(
            f"{argument}: wanted a directory written by save_pretrained, got {str(path)!r}, which is not one"
        )
    if needed is not None and not (directory / needed).is_file():
        raise ValueError(f"{argument}: wanted a directory with a {needed}, got {str(directory)!r} without one")
    return directory


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    argument: str = "path",
) -> PreTrainedModel:
    """A causal LM from a directory that holds config.json and safetensors weights.

    path: the directory.  dtype, device: of the parameters.
    trust_remote_code: run Python code that lies in the directory; off by default.
    argument: what to call `path` in an error ("--student", "--teacher math").
    Returns: the model, in eval mode.
    Raises: ValueError where there is no such directory, its files are missing or cut short, a weight of the model is
        not in them, or transformers cannot load it (pickled weights included).
    """
    from transformers import AutoModelForCausalLM

    directory = _directory(path, argument, "config.json")
    check_safetensors_folder(directory, argument=argument)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many types for a folder it cannot read; the user needs one line
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{argument}: cannot load a causal LM from {str(directory)!r}: {reason}") from error
    # transformers fills what is missing with random numbers and goes on.
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{argument}: {len(missing)} weights of {type(model).__name__} are not in {str(directory)!r}: "
            + ", ".join(missing[:5])
        )
    return model.to(device).eval()


def random_qwen3(hidden_size: int, vocab_size: int, *, seed: int) -> PreTrainedModel:
    """A Qwen3 with random weights and a tied head: the 0.6B one where hidden_size is 1,024 and vocab_size 151,936.

    hidden_size: a multiple of 64; below 1,024 the model has 2 layers in place of 28
    Returns: the model, float32, on the CPU, in eval mode.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = max(2, hidden_size // 64)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=28 if hidden_size >= 1024 else 2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=128,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).eval()


def load_tokenizer(
    path: str | Path, *, trust_remote_code: bool = False, argument: str = "path"
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory.

    Raises: ValueError where the directory has none, or one without an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    directory = _directory(path, argument)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{argument}: cannot load a tokenizer from {str(directory)!r}: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{argument}: wanted a tokenizer with an end-of-sequence token, got none in {str(directory)!r}"
        )
    return tokenizer


def token_to_id(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token -> id, added tokens included: what must agree between the student and its teachers."""
    return dict(tokenizer.get_vocab())


def language_model(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel and the like; one that is not wrapped is itself."""
    while not hasattr(module, "config") and isinstance(getattr(module, "module", None), torch.nn.Module):
        module = module.module
    return module


def vocabulary_rows(module: PreTrainedModel) -> int:
    """Rows of the table that the model looks its input's ids up in.

    Raises: ValueError for a model that reads anything else than one sequence of ids.
    """
    words = module.get_input_embeddings()
    if not isinstance(getattr(words, "weight", None), torch.Tensor):
        raise ValueError(
            f"rollouts: {type(module).__name__} reads {type(words).__name__}, wanted one table of the ids it reads"
        )
    return words.weight.shape[0]


def max_positions(module: PreTrainedModel) -> int | None:
    """The longest sequence the model has positions for: rows of a table; None where positions are computed as needed.

    A rotary model can be given more than its max_position_embeddings, and computes what it computes.
    """
    config = module.config.get_text_config()
    limit = next((n for name in _POSITIONS if isinstance(n := getattr(config, name, None), int) and n > 0), None)
    if limit is None:
        return None
    words = module.get_input_embeddings()
    longest = []
    for table in module.modules():
        if isinstance(table, torch.nn.Embedding) and table is not words:
            # Some tables begin with two rows that no position uses, some families after their padding's row.
            first = 0 if table.padding_idx is None else table.padding_idx + 1
            if table.num_embeddings in (limit, limit + 2):
                longest.append(min(limit, table.num_embeddings - first))
    # Sines of every position, made once: a table too. Those of rotations grow, or belong to a module of their own.
    longest += [limit for table in module.buffers() if table.dim() == 2 and table.shape[0] == limit]
    if getattr(getattr(config, "attn_config", None), "alibi", False):  # MPT's slopes are made for so many
        longest.append(limit)
    return min(longest, default=None)


def end_token_ids(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a completion: the tokenizer's and all of the model folder's generation config, sorted."""
    ids = {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        configured = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if configured is not None:
            ids.update(int(token) for token in (configured if isinstance(configured, list) else [configured]))
            break
    return tuple(sorted(ids))


def padding_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padded positions; any id does, since they are masked, so eos stands in for a missing one."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: str | Path) -> None:
    """Writes what `AutoModelForCausalLM.from_pretrained(directory)` reads: config, safetensors, tokenizer.

    Mutates: the directory, which is created where missing. Not atomic: see opd_engine.train.checkpoint.
    """
    model.save_pretrained(directory, safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)

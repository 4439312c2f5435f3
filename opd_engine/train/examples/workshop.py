"""Where the embedded examples' models are made, and kept by a hash of everything that made them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opd_engine.integrations.hf.models import save_model
from opd_engine.train.examples.pretrain import make_model, train_on_sequences
from opd_engine.train.examples.settings import ModelShape, Supervision
from opd_engine.train.experiment import ShowProgress
from opd_engine.whole_files import whole_or_absent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELS = "models"
"""Folder, in a run's own, of models that are not to be reused."""

# Part of every key: models made by an older recipe are not reused.
_RECIPE = 1

DrawBatch = Callable[[torch.Generator], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Workshop:
    """Makes what is not there yet.

    folder: of all that is made.  seed: of the run; each model has its own place in it.
    make: False on ranks other than the first: they only find.
    """

    folder: Path
    seed: int
    show_progress: ShowProgress
    make: bool

    def made(self, name: str, key: Sequence[Any], write: Callable[[Path], None]) -> Path:
        """The folder of that name and key, filled by `write` where it is absent."""
        text = json.dumps([_RECIPE, torch.__version__, name, *key], sort_keys=True)
        target = self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if self.make and not target.exists():
            try:
                with whole_or_absent(target) as writing:
                    write(writing)
            except OSError:
                # Another run with the same settings was first: its folder is whole.
                if not target.exists():
                    raise
        return target

    def trained(
        self,
        name: str,
        data: Sequence[Any],
        shape: ModelShape,
        supervision: Supervision,
        tokenizer: PreTrainedTokenizerBase,
        draw: DrawBatch,
        place: int,
    ) -> Path:
        """The folder of a model of that shape, trained on that data.

        data: what tells this data from other data, for the key.  place: of the model among those of the run.
        """
        seed = self.seed * 16 + place

        def write(folder: Path) -> None:
            model = make_model(shape, len(tokenizer), tokenizer, seed)
            on_step = self.show_progress(f"making {name}", supervision.steps)
            train_on_sequences(model, draw, supervision, seed=seed, on_step=on_step)
            save_model(model, tokenizer, folder)

        return self.made(name, [seed, *data, dataclasses.asdict(shape), dataclasses.asdict(supervision)], write)

"""RolloutBatch -> what a transformers model takes: a right-padded batch, or one packed stream with its own positions.

Packing is used where an attention reads sequences of unequal length as they are (flash attention): a masked one would
pay the square of the whole stream. That no row sees another sequence is tried on the model, never assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_engine.distillation.rollout import RolloutBatch, pack_rollouts
from opd_engine.integrations.hf.backend import pad_packed
from opd_engine.parallel.sharded_modules import reshard, within

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelInput:
    """What the model's forward is given, and where the wanted rows lie in what comes out.

    arguments: of forward. output_rows: [n] int64 of the flattened output, on the device
    packed_rows: [n] int64 on the host, the packed row of each; -1 for the one that fills an empty choice
    """

    arguments: dict[str, Tensor]
    output_rows: Tensor
    packed_rows: Tensor


def model_input(batch: RolloutBatch, device: torch.device, *, packed: bool) -> ModelInput:
    """The batch as the model sees it, its rows that count being wanted, or one that fills where none do."""
    wanted = batch.loss_mask.nonzero().flatten().cpu()
    packed_rows = wanted if wanted.numel() else torch.full((1,), -1)
    if packed:
        rows = torch.arange(batch.num_tokens, device=device)
        arguments = {
            "input_ids": batch.tokens.to(device)[None],
            "position_ids": batch.row_positions().to(device)[None],
        }
    else:
        input_ids, attention_mask, rows = pad_packed(batch, device)
        # Positions are written out: some models would otherwise count the padding.
        positions = torch.arange(input_ids.shape[1], device=device).expand(input_ids.shape)
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    return ModelInput(arguments, rows[packed_rows.clamp(min=0).to(device)], packed_rows)


def reads_unequal_lengths(model: PreTrainedModel) -> bool:
    """Whether the model's attention takes a packed stream without a mask of its square."""
    return "flash" in str(getattr(model.config, "_attn_implementation", ""))


@torch.no_grad()
def keeps_sequences_apart(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether packed sequences neither see nor count each other, tried on the model with a few tokens.

    A sequence's rows must not change by a single bit when the one before it is exchanged (an attention that looks
    across, a convolution or a state that runs on), and be what the sequence gives alone (positions).
    """
    vocab_size = int(model.config.get_text_config().vocab_size)
    tokens = [[i * step % vocab_size for i in range(1, 6)] for step in (1, 3, 2)]

    def last_rows(sequences: list[list[int]]) -> Tensor:
        batch = pack_rollouts(sequences, [[] for _ in sequences])
        arguments = model_input(batch, device, packed=True).arguments
        logits = within(model, lambda: model.forward(**arguments, use_cache=False).logits)
        return logits[0, -len(tokens[1]) :].float()

    was_training = model.training
    model.eval()
    try:
        after_one, after_other, alone = (
            last_rows(s) for s in ([tokens[0], tokens[1]], [tokens[2], tokens[1]], tokens[1:2])
        )
    finally:
        model.train(was_training)
        reshard(model)
    tolerance = 64 * torch.finfo(model.dtype).eps * float(alone.abs().max())
    return torch.equal(after_one, after_other) and float((after_one - alone).abs().max()) <= tolerance

"""MegatronGroups: the process groups of one Megatron layout, read once and passed on, never asked of globals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd_engine.parallel.collectives import group_rank, group_size

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from opd_engine.parallel.collectives import ProcessGroup


@dataclass(frozen=True)
class MegatronGroups:
    """This rank's groups. A group of one rank is a group all the same: Megatron asks every one for its size.

    tp, pp, cp: tensor, pipeline and context parallel
    dp: data parallel, ranks that hold different samples; dp_cp: dp x cp, over which gradients are reduced
    embd, pos_embd: the stages that share the word or the position embedding, or None
    """

    tp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup
    dp_cp: ProcessGroup
    embd: ProcessGroup | None = None
    pos_embd: ProcessGroup | None = None

    @classmethod
    def from_parallel_state(cls) -> MegatronGroups:
        """What megatron.core.parallel_state holds now.

        Raises: ValueError before initialize_model_parallel.
        """
        from megatron.core import parallel_state

        if not parallel_state.model_parallel_is_initialized():
            raise ValueError(
                "groups: wanted megatron.core.parallel_state initialised (initialize_model_parallel), got none"
            )
        return cls(
            tp=parallel_state.get_tensor_model_parallel_group(),
            pp=parallel_state.get_pipeline_model_parallel_group(),
            cp=parallel_state.get_context_parallel_group(),
            dp=parallel_state.get_data_parallel_group(),
            dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
            embd=parallel_state.get_embedding_group(check_initialized=False),
            pos_embd=parallel_state.get_position_embedding_group(check_initialized=False),
        )

    @property
    def tp_size(self) -> int:
        return group_size(self.tp)

    @property
    def tp_rank(self) -> int:
        return group_rank(self.tp)

    @property
    def pp_size(self) -> int:
        return group_size(self.pp)

    @property
    def cp_size(self) -> int:
        return group_size(self.cp)

    @property
    def cp_rank(self) -> int:
        return group_rank(self.cp)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return group_rank(self.pp) == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer; scores and losses exist only here."""
        return group_rank(self.pp) == self.pp_size - 1

    def collection(self) -> ProcessGroupCollection:
        """The groups as Megatron's schedules take them."""
        from megatron.core.process_groups_config import ProcessGroupCollection

        collection = ProcessGroupCollection()
        for name in ("tp", "pp", "cp", "dp", "dp_cp", "embd", "pos_embd"):
            setattr(collection, name, getattr(self, name))
        return collection

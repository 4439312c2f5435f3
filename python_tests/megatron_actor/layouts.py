"""The layouts that MegatronActor is checked at, and the names of the checks, for pytest's own process and the ranks."""

from dataclasses import dataclass

BOUND = 1e-5

CHECKS = (
    "scores",
    "routed",
    "averaged",
    "mixed",
    "splits",
    "supports",
    "engine_topk",
    "kept_hidden",
    "own_prompts",
    "chunked_head",
    "no_loss_token",
    "steps",
)
"""Functions of megatron_actor.gradient_ranks and megatron_actor.support_ranks; `controls` is the other one."""


@dataclass(frozen=True)
class Layout:
    """How a layout splits the job. padded_vocab_size: a multiple of tp, with columns beyond the vocabulary."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    context: str = "zigzag"
    distributed_optimizer: bool = False
    padded_vocab_size: int = 64

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2 sequence parallel": Layout(tp=2, sequence_parallel=True),
    "tp3 padded vocabulary": Layout(tp=3, padded_vocab_size=66),
    "cp2 zigzag": Layout(cp=2),
    "cp2 allgather": Layout(cp=2, context="allgather"),
    "pp2": Layout(pp=2),
    "dp2 distributed optimizer": Layout(dp=2, distributed_optimizer=True),
    "dp2 cp2 distributed optimizer": Layout(dp=2, cp=2, distributed_optimizer=True),
    "tp2 cp2": Layout(tp=2, cp=2, sequence_parallel=True),
    "tp2 pp2": Layout(tp=2, pp=2, sequence_parallel=True),
}

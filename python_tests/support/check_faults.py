"""Faults planted in the engine: what `opd-engine check` has to see.

A fault replaces an op or a function by one that calls the original and spoils what it gives or was given. It can be
planted in this process (`planted`), or in every process of a command through the sitecustomize that `plant_in_commands`
writes, which is how the command itself is shown to turn red.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import opd_engine
from opd_engine.functional import linear_chunks, linear_gradients, linear_losses, linear_scores
from ranks import python_environment

OPS = torch.ops.opd_engine
LOG_PROBS, TAIL, LSE, ENTROPY, TARGET = range(5)  # of an op's outputs; top-k's ids come before them


@dataclass(frozen=True)
class Fault:
    """functions: the exported names, one of whose cells at least must fail; ranks: how many it needs."""

    functions: tuple[str, ...]
    replace: Callable[[], list[tuple[object, str, Callable]]]  # (where, name, what stands there instead)
    ranks: int = 1


def spoiled(where: object, name: str, spoil: Callable) -> tuple[object, str, Callable]:
    """spoil(original, *arguments) in the place of where.name."""
    original = getattr(where, name)
    return where, name, lambda *arguments, **options: spoil(original, *arguments, **options)


def output(names: tuple[str, ...], position: int, change: Callable) -> Callable:
    """One output of ops; top-k's lie one further on."""

    def replace() -> list:
        def spoil(shift: int) -> Callable:
            def call(original, *arguments):
                found = list(original(*arguments))
                found[position + shift] = change(found[position + shift])
                return tuple(found)

            return call

        return [spoiled(OPS, name, spoil("topk" in name)) for name in names]

    return replace


def argument(names: tuple[str, ...], argument_name: str, change: Callable) -> Callable:
    """What ops are given under this name of their schema."""

    def replace() -> list:
        def spoil(name: str) -> Callable:
            schema = getattr(OPS, name).default._schema
            position = [one.name for one in schema.arguments].index(argument_name)

            def call(original, *arguments):
                return original(*arguments[:position], change(arguments[position]), *arguments[position + 1 :])

            return call

        return [spoiled(OPS, name, spoil(name)) for name in names]

    return replace


def whole(name: str, change: Callable) -> Callable:
    """The only output of an op."""
    return lambda: [spoiled(OPS, name, lambda original, *arguments: change(original(*arguments)))]


def written(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """What an op writes over its first argument."""

    def call(original, logits, *arguments):
        result = original(logits, *arguments)
        logits.copy_(change(logits.clone()))
        return result

    return lambda: [spoiled(OPS, name, call)]


def not_written(name: str) -> Callable:
    """An op that leaves its first argument as it was."""

    def call(original, logits, *arguments):
        return original(logits.clone(), *arguments)

    return lambda: [spoiled(OPS, name, call)]


def function(name: str, **forced: object) -> Callable:
    """An exported function that ignores an option."""

    def call(original, *arguments, **options):
        names = list(inspect.signature(original).parameters)[: len(arguments)]
        given = {**dict(zip(names, arguments, strict=True)), **options}
        return original(**{**given, **{key: value for key, value in forced.items() if key in given}})

    return lambda: [spoiled(opd_engine, name, call)]


def more(values: torch.Tensor) -> torch.Tensor:
    """1% more."""
    return values * 1.01


def next_row(values: torch.Tensor) -> torch.Tensor:
    return values.roll(1, 0)


def nothing(_: object) -> None:
    return None


def plausible(values: torch.Tensor) -> torch.Tensor:
    """A number where NaN is right."""
    return torch.where(values.isnan(), -1.0, values)


def one_more(ids: torch.Tensor | None) -> torch.Tensor | None:
    return None if ids is None else torch.where(ids >= 0, (ids + 1) % 1031, ids)


def first_more(found: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return more(found[0]), *found[1:]


def overwrite(original, accumulated, weight, *, is_added):
    """deliver_weight_gradient, forgetting what main_grad held."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is not None and not is_added:
        main_grad.zero_()
    return original(accumulated, weight, is_added=is_added)


def emptied(original, weight):
    """weight_accumulator, forgetting what main_grad held."""
    main_grad = original(weight)
    return None if main_grad is None else main_grad.zero_()


WITH_SCORES = ("topk_log_probs", "merge_topk", "gather_log_probs", "merge_gather")
WITH_TARGET = ("topk_log_probs", "topk_partials", "gather_log_probs", "gather_partials")
WITH_ROW_TEMPERATURE = (
    *("topk_partials", "merge_topk", "topk_log_probs", "gather_partials", "merge_gather", "gather_log_probs"),
    *("scores_backward", "scores_backward_", "full_divergence", "full_divergence_backward"),
    *("full_divergence_backward_", "distill_loss_"),
)
SCORES = ("topk_log_probs", "gather_log_probs", "linear_topk_log_probs", "linear_gather_log_probs")
LINEAR = ("linear_distill_loss",)
FULL = ("full_distill_loss", "linear_full_distill_loss")
OP = "torch.ops.opd_engine"

# Every function that a fault names has to see it by cells of its own.
FAULTS = {
    "entropy of the wrong sign": Fault((*SCORES, OP), output(WITH_SCORES, ENTROPY, torch.neg)),
    "1% in lse": Fault((*SCORES, OP), output(WITH_SCORES, LSE, more)),
    "target's row off by one": Fault((*SCORES, OP), output(WITH_SCORES, TARGET, next_row)),
    "1% in the tail": Fault((*SCORES, "distill_loss", OP), output(WITH_SCORES, TAIL, more)),
    "1% in log-probs": Fault((*SCORES, "distill_loss", OP), output(WITH_SCORES, LOG_PROBS, more)),
    "a plausible number of a repeated id": Fault(("gather_log_probs",), output(WITH_SCORES, LOG_PROBS, plausible)),
    "target's id off by one": Fault((*SCORES, OP), argument(WITH_TARGET, "target", one_more)),
    "row temperatures ignored": Fault(
        (*SCORES, *LINEAR, *FULL, OP), argument(WITH_ROW_TEMPERATURE, "row_temperature", nothing)
    ),
    "row temperatures ignored in distill_loss_": Fault(
        LINEAR, argument(("distill_loss_",), "row_temperature", nothing)
    ),
    "row temperatures off by one in backward": Fault(
        ("gather_log_probs", OP),
        argument(("scores_backward",), "row_temperature", lambda rows: None if rows is None else next_row(rows)),
    ),
    "1% in the scores' gradient": Fault(("gather_log_probs", "distill_loss", OP), whole("scores_backward", more)),
    "the scores' gradient off by one row": Fault(
        ("gather_log_probs", "distill_loss", OP), whole("scores_backward", next_row)
    ),
    "entropy's gradient dropped": Fault(
        ("gather_log_probs", OP),
        argument(
            ("scores_backward", "scores_backward_"),
            "upstream",
            lambda upstream: torch.cat([upstream[:, :-2], torch.zeros_like(upstream[:, -2:])], 1),
        ),
    ),
    "in place: the logits stay": Fault(
        ("gather_log_probs", "distill_loss", "linear_gather_log_probs", OP), not_written("scores_backward_")
    ),
    "in place: 1%": Fault(
        ("gather_log_probs", "distill_loss", "linear_gather_log_probs", OP), written("scores_backward_", more)
    ),
    "1% in the bucket loss": Fault(
        ("distill_loss", OP),
        lambda: [spoiled(OPS, "bucket_divergence", lambda original, *given: first_more(original(*given)))],
    ),
    "the floor dropped": Fault(("distill_loss", OP), argument(("bucket_divergence",), "teacher_log_prob_min", nothing)),
    "the floor dropped in distill_loss_": Fault(
        (*LINEAR, OP), argument(("distill_loss_",), "teacher_log_prob_min", nothing)
    ),
    "the tail mode ignored": Fault(("distill_loss",), argument(("bucket_divergence",), "tail", lambda _: "bucket")),
    "the tail mode ignored in distill_loss_": Fault(LINEAR, argument(("distill_loss_",), "tail", lambda _: "bucket")),
    "1% in distill_loss_": Fault((*LINEAR, OP), whole("distill_loss_", more)),
    "1% in the gradient of distill_loss_": Fault((*LINEAR, OP), written("distill_loss_", more)),
    "distill_loss_ leaves the logits": Fault((*LINEAR, OP), not_written("distill_loss_")),
    "distill_loss_ weighs rows alike": Fault((*LINEAR, OP), argument(("distill_loss_",), "weights", torch.ones_like)),
    "distill_loss_ off by one row": Fault((*LINEAR, OP), written("distill_loss_", next_row)),
    "beta ignored": Fault(
        (*LINEAR, *FULL, "distill_loss", OP),
        argument(("distill_loss_", "bucket_divergence", "full_divergence"), "beta", lambda _: 0.5),
    ),
    "alpha ignored": Fault(
        (*LINEAR, *FULL, "distill_loss", OP),
        argument(("distill_loss_", "bucket_divergence", "full_divergence"), "alpha", lambda _: 0.1),
    ),
    "1% in the full loss": Fault((*FULL, OP), whole("full_divergence", more)),
    "1% in the full gradient": Fault(("full_distill_loss", OP), whole("full_divergence_backward", more)),
    "1% in the full gradient in place": Fault((*FULL, OP), written("full_divergence_backward_", more)),
    "in place: the full loss leaves the logits": Fault((*FULL, OP), not_written("full_divergence_backward_")),
    "the teacher's vocabulary ignored": Fault(
        FULL,
        argument(
            ("full_divergence", "full_divergence_backward", "full_divergence_backward_"),
            "teacher_vocab_size",
            lambda _: 1031,
        ),
    ),
    "gradients where a logit is -inf": Fault(
        ("gather_log_probs",),
        lambda: [
            spoiled(
                OPS,
                "scores_backward",
                lambda original, logits, *rest: original(logits, *rest) + (logits == -torch.inf) * 0.01,
            )
        ],
    ),
    "ids of top-k reversed": Fault(
        ("topk_log_probs", "linear_topk_log_probs", OP),
        output(("topk_log_probs", "merge_topk"), -1, lambda ids: ids.flip(-1)),
    ),
    "the soft-cap's slope missing": Fault(
        ("linear_gather_log_probs", "linear_distill_loss", "linear_full_distill_loss"),
        lambda: [spoiled(linear_chunks.ChunkLogits, "uncap_", lambda original, *_: None)],
    ),
    "main_grad overwritten": Fault(
        ("linear_gather_log_probs", "linear_distill_loss", "linear_full_distill_loss"),
        lambda: [
            spoiled(linear_losses, "deliver_weight_gradient", overwrite),
            spoiled(linear_losses, "weight_accumulator", emptied),
            spoiled(linear_scores, "weight_accumulator", emptied),
        ],
    ),
    "mixtures all arithmetic": Fault(("mix_teachers",), function("mix_teachers", mode="arithmetic")),
    "mixtures weigh members alike": Fault(
        ("mix_teachers",), function("mix_teachers", weights=torch.tensor([1.0, 1.0, 0.0]))
    ),
    "no rank adds the others' hidden gradient": Fault(
        ("linear_gather_log_probs", "linear_distill_loss", "linear_full_distill_loss"),
        lambda: [spoiled(linear_gradients, "all_reduce_sum_", lambda original, tensor, group: tensor)],
        ranks=2,
    ),
    "partial losses not added": Fault(
        ("gather_log_probs",), function("gather_log_probs", loss_reduction="replicated"), ranks=2
    ),
    "gradients divided by the ranks": Fault(
        ("gather_log_probs", "distill_loss", OP), whole("scores_backward", lambda grad: grad / 2), ranks=2
    ),
}


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The fault, for the length of the block."""
    replacements = FAULTS[name].replace()
    originals = [(where, attribute, getattr(where, attribute)) for where, attribute, _ in replacements]
    try:
        for where, attribute, stand_in in replacements:
            setattr(where, attribute, stand_in)
        yield
    finally:
        for where, attribute, original in originals:
            setattr(where, attribute, original)


def plant_in_commands(name: str, folder: Path) -> dict[str, str]:
    """The environment of a command whose Python processes all have the fault."""
    (folder / "sitecustomize.py").write_text(
        f"import check_faults\nkept = check_faults.planted({name!r})\nkept.__enter__()\n"
    )
    return environment_with(folder)


def environment_with(folder: Path) -> dict[str, str]:
    """The environment of a command that runs the sitecustomize in the folder."""
    return python_environment(folder)

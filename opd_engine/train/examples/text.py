"""The second example's data: English prose that ships inside CPython, cut into passages of equal length.

`pydoc_data.topics` is the language reference as `help()` prints it, about 0.5 MB. A byte-level BPE vocabulary is
trained on it here; nothing is downloaded.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<end>"
PAD = "<pad>"


def read_documents() -> list[str]:
    """The documentation's topics, in the order of their names; the text differs a little between Python versions."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def make_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of exactly vocab_size ids, trained on the documents.

    Raises: ValueError where the text has too few different pairs for that many ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(f"text.vocab_size: wanted at most {backend.get_vocab_size()} for this text, got {vocab_size}")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)


def cut_passages(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[tuple[int, ...]]:
    """Passages of `length` ids, one after the other; what is left at a document's end is dropped."""
    passages = []
    for document in documents:
        token_ids = [*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]
        passages += [tuple(token_ids[at : at + length]) for at in range(0, len(token_ids) - length + 1, length)]
    return passages


def split_passages(
    passages: list[tuple[int, ...]], held_out: float, seed: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(training, held-out) passages; nobody trains on the held-out ones: teacher, student or rollouts."""
    order = list(passages)
    random.Random(f"{seed}/text").shuffle(order)
    count = max(1, round(held_out * len(order)))
    return order[count:], order[:count]

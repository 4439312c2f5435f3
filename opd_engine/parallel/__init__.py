"""F2: who holds which part of the vocabulary or of the sequence, and every collective of the project.

The only home of torch.distributed; it knows nothing of the mathematics of losses.
Read vocab.py, then collectives.py; linear.py, sequences.py and launch.py stand on their own.
"""

from opd_engine.parallel.vocab import VocabShard, local_logits

__all__ = ["VocabShard", "local_logits"]

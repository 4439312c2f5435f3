"""transformers: causal LMs as students and teachers, and a rollout engine with a KV cache.

Imported only by those who use it: `import opd_engine` never needs transformers.
"""

from opd_engine.integrations.hf.backend import HFBackend, ProjectingHFBackend, make_backend
from opd_engine.integrations.hf.models import load_model, load_tokenizer, save_model, token_to_id
from opd_engine.integrations.hf.rollout import Completions, generate

__all__ = [
    "Completions",
    "HFBackend",
    "ProjectingHFBackend",
    "generate",
    "load_model",
    "load_tokenizer",
    "make_backend",
    "save_model",
    "token_to_id",
]

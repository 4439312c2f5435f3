"""The names that options of several floors choose among. Imports nothing: a command line shows them without torch."""

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
TAIL_MODES = ("bucket", "truncate", "renormalize")

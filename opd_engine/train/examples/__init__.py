"""The two embedded examples: their settings, data and models, made from nothing; distillation knows none of it."""

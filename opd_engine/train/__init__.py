"""The training loop behind `opd-engine train`: configuration, tasks, rollouts, checkpoints, metrics and plots."""

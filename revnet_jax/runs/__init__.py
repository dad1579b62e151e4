"""The folder of a run: config, checkpoints, metrics and history, and how runs compare."""

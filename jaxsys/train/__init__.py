"""The training loop shared by every system: optimiser presets, checkpoints, logs."""

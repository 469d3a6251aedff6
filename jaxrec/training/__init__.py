"""The training loop of the sequence models: steps, losses, checkpoints, several devices and processes."""

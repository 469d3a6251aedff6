"""The sequence models (Flax NNX)."""

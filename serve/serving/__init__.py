"""Loaded models in use: versions, users' states and batches."""

"""Losses of policies: pure functions on arrays, one file a family."""

"""The logit that no item with it is ever recommended by."""

NEVER = -1e30
"""The logit of padding and of excluded items."""

"""Ranks items with the graphs of one model: on arrays and item indices, no raw ids."""

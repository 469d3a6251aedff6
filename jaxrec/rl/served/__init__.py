"""A policy trained on what a server recommended and what came of it."""

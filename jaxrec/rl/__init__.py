"""Reinforcement learning of a policy on top of the supervised recommender, and the decision whether it is used."""

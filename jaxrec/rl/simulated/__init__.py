"""A policy trained on simulated users."""

"""A policy trained on the events of the run's own log."""

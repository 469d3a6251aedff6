"""Full-catalogue ranking metrics, their intervals, and the baselines beside the models."""

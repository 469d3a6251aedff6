"""Users to recommend to, as pure `reset` and `step` functions: one whose best policy is known, one fitted on logs."""

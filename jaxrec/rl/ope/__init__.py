"""Off-policy evaluation: what a new policy would have earned, from the log of another one; NumPy in and out, float64.

`weights` compares the two policies at what was logged, and `sample_size` says how much of the log is left then.
`estimators` turn weights and rewards into terms, `intervals` says how sure the terms are, by `resampling` users, and
`gate` decides whether the new policy may be used. Shapes that do not fit raise ValueError.
"""

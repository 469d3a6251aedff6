"""Exports what a run learned: the policy where it is used, else the supervised hybrid."""

from pathlib import Path
from typing import Any

from jaxrec.config import to_json
from jaxrec.data.content import item_content
from jaxrec.data.prepared import PreparedData
from jaxrec.files import read_json
from jaxrec.onnx.added_items import ContentHeads
from jaxrec.onnx.model_directory import export_model
from jaxrec.runs.directory import (
    CONTENT_HEAD_FILE,
    EVALUATION_FILE,
    HYBRID_FILE,
    Run,
    load_supervised,
    open_run,
    read_content_heads,
)
from jaxrec.runs.policy import load_served
from jaxrec.runs.tracking import Tracker

NO_LICENCE = "No notes on the data's licence were given at export (`jaxrec export --licence FILE`).\n"


def export(
    run: Run | Path | str,
    out: Path | str,
    licence: str = NO_LICENCE,
    int8: bool = False,
    index: bool | None = None,
    mlflow: str | None = None,
) -> dict[str, Any]:
    """Writes the model directory for `python -m serve`, wholly or not at all.

    Args:
        run: A run or its folder.
        out: The model directory; replaced if it exists.
        licence: Text about the data's licence, kept with the model.
        int8: Quantize the LSTMs to 8 bits.
        index: Whether to add an approximate index of the items; None: for catalogues of 50,000 items and more. With an
            index, items without training events have zero vectors and rank low until the trend of their first events
            lifts them (in a mix without a trend: until the next training), and a line says how many they are.
        mlflow: URI of MLflow's tracking server or store, which keeps the model directory as the artifact `model` of the
            run that `train` tracked there (of a new one, if it did not), in place of an earlier one, and the means of
            the metrics. None: none does.

    Returns:
        The manifest, with the metrics of the run's last evaluation (empty before one).

    Raises:
        DataError: The run cannot be read.
        ExportError: The graphs differ from JAX, or the quantized graphs or the index are too far off.
        TrackingError: MLflow does not answer; or it does not take the model, which is written then.
    """
    run, tracker = open_run(run), None if mlflow is None else Tracker(mlflow)
    if tracker is not None:
        tracker.find(run)
    data = run.read_data()
    hybrid = load_served(run, load_supervised(run, data))
    evaluation = run.folder / EVALUATION_FILE
    manifest = export_model(
        hybrid,
        data,
        Path(out),
        training={
            "model": to_json(run.model_config),
            "train": to_json(run.train_config),
            "mix": hybrid.mix_weights()._asdict(),
            "prepare": to_json(data.config),
        },
        metrics=read_json(evaluation, "run `jaxrec evaluate` again") if evaluation.exists() else {},
        licence=licence,
        int8=int8,
        index=index,
        heads=_content_heads(run, data),
    )
    if tracker is not None:
        tracker.begin(run, "FINISHED")
        tracker.log_model(Path(out), manifest)
    return manifest


def _content_heads(run: Run, data: PreparedData) -> ContentHeads | None:
    """None where the run has none, since nothing is known of any item."""
    if not (run.folder / CONTENT_HEAD_FILE).is_file():
        return None
    features = item_content(data)
    mix = read_json(run.folder / HYBRID_FILE, "train again")
    # No higher than the new items that the catalogue has: of those it is known what they cost.
    shifts = [mix[name]["shift"] for name in ("hidden_items", "new_items") if mix[name] is not None]
    return ContentHeads(*read_content_heads(run, features.names), features, min(shifts))

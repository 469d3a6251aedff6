"""`jaxrec export`."""

from pathlib import Path

import click

from jaxrec.cli.options import EXISTING_FILE, EXISTING_FOLDER, NEW_FOLDER, mlflow_option

INDEX = {"auto": None, "always": True, "never": False}


@click.command()
@click.argument("run", type=EXISTING_FOLDER)
@click.option("--out", type=NEW_FOLDER, required=True, help="The model directory; replaced if it exists.")
@click.option("--licence", type=EXISTING_FILE, help="Text about the data's licence, kept with the model.")
@click.option("--int8", is_flag=True, help="Quantize the LSTMs to 8 bits; refused if the answers get worse.")
@click.option(
    "--index",
    type=click.Choice(list(INDEX)),
    default="auto",
    help="Add an approximate index of the items; auto: for large catalogues. With an index new items rank low. "
    "Refused if it misses too many of the best items.",
)
@mlflow_option("Keep the model and its test metrics")
def export(run: Path, out: Path, licence: Path | None, int8: bool, index: str, mlflow: str | None) -> None:
    """Exports RUN to ONNX for `python -m serve`; refused if ONNX Runtime and JAX differ."""
    from jaxrec.runs.export import NO_LICENCE
    from jaxrec.runs.export import export as export_run

    text = licence.read_text(encoding="utf-8") if licence else NO_LICENCE
    manifest = export_run(run, out, text, int8, INDEX[index], mlflow)
    if not manifest["metrics"]:
        click.echo(f"{run} was not evaluated (`jaxrec evaluate`): the manifest has no metrics", err=True)
    parity = manifest["parity"]["max_abs_difference"]
    click.echo(f"{out}: model {manifest['model_version']}, policy {manifest['policy']}, within {parity:.1e} of JAX")

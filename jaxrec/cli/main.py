"""The command line: each command is one stage, and does what the function of the same name does from Python."""

from pathlib import Path

import click
from click.core import ParameterSource

from jaxrec.cli.data import append, check, prepare
from jaxrec.cli.distributed import prepare_distributed
from jaxrec.cli.rl import SEED, SEED_HELP, rl
from jaxrec.config import CheckpointConfig, ModelConfig, TrainConfig
from jaxrec.data.movielens import BASE_URL, DATASETS
from jaxrec.data.movielens import fetch as fetch_archive
from jaxrec.errors import DataError, ExportError, ProcessLost, TrainingError, TrainingStopped
from jaxrec.runs.train import extend_run, train_run
from jaxrec.training.processes import join, leave, leave_at_once
from jaxrec.training.stopping import stop_on_signals

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)


class _Group(click.Group):
    def invoke(self, context: click.Context) -> object:
        """Errors that the user can mend are one line on stderr and exit status 1."""
        try:
            return super().invoke(context)
        except (DataError, TrainingError, ExportError) as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(f"{error.filename or 'file'}: {error.strerror or error}") from error


@click.group(cls=_Group, context_settings={"show_default": True})
@click.version_option(package_name="jaxrec")
def main() -> None:
    """Next-item recommendation from an interaction log: prepare, train, rl, evaluate, export; then serve."""


main.add_command(prepare)
main.add_command(append)
main.add_command(check)


@main.command()
@click.argument("data", type=EXISTING_FOLDER, required=False)
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder for the run.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run, with the options that it started with.")
@click.option(
    "--data",
    "new_data",
    type=EXISTING_FOLDER,
    help="With --resume: go on with this data, from `jaxrec append`, and its new items. Only --max-epochs, --patience "
    "and --learning-rate can change with it.",
)
@click.option(
    "--max-epochs",
    type=click.IntRange(1),
    default=TrainConfig.max_epochs,
    help="Passes over the training events, at most.",
)
@click.option(
    "--patience",
    type=click.IntRange(1),
    default=TrainConfig.patience,
    help="Epochs without a better validation NDCG@10 before training stops.",
)
@click.option("--batch-tokens", type=click.IntRange(1), default=TrainConfig.batch_tokens, help="Events per step.")
@click.option("--learning-rate", type=float, default=TrainConfig.learning_rate, help="Its peak, after the warm-up.")
@click.option("--hidden", type=click.IntRange(1), default=ModelConfig.hidden, help="Width of the LSTM.")
@click.option("--max-length", type=click.IntRange(2), default=ModelConfig.max_length, help="Events read of a history.")
@click.option("--seed", type=SEED, default=TrainConfig.seed, help=SEED_HELP)
@click.option(
    "--checkpoint-seconds",
    type=click.FloatRange(0),
    default=CheckpointConfig.seconds,
    help="Save so often within an epoch, too.",
)
@click.option(
    "--keep-checkpoints",
    type=click.IntRange(1),
    default=CheckpointConfig.keep,
    help="How many of the latest stay, beside the best epoch's.",
)
@click.option(
    "--item-shards",
    type=click.IntRange(1),
    default=1,
    help="Devices over which the item tables and the softmax are split; batches are split over the groups of so many.",
)
@click.option(
    "--coordinator",
    metavar="HOST:PORT",
    envvar="JAX_COORDINATOR_ADDRESS",
    help="Where the first of several processes listens; run the same command in each of them.",
)
@click.option("--process-count", type=click.IntRange(1), envvar="JAX_NUM_PROCESSES", help="How many there are.")
@click.option("--process-index", type=click.IntRange(0), envvar="JAX_PROCESS_ID", help="Which one this is, from 0.")
@click.pass_context
def train(
    context: click.Context,
    data: Path | None,
    out: Path,
    resume: bool,
    new_data: Path | None,
    max_epochs: int,
    patience: int,
    batch_tokens: int,
    learning_rate: float,
    hidden: int,
    max_length: int,
    seed: int,
    checkpoint_seconds: float,
    keep_checkpoints: int,
    item_shards: int,
    coordinator: str | None,
    process_count: int | None,
    process_index: int | None,
) -> None:
    """Trains both sequence models on DATA (from `jaxrec prepare`) and tunes their mix on validation.

    SIGTERM and Ctrl-C save and end the run; --resume goes on with exactly the same result, DATA can be left out then.
    """
    model_config = ModelConfig(hidden=hidden, max_length=max_length)
    train_config = TrainConfig(
        seed=seed,
        max_epochs=max_epochs,
        patience=patience,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
    )
    changes = _changes_on_resume(context, train_config) if resume else {}
    if not resume and (data is None or new_data is not None):
        raise click.UsageError("DATA is missing" if data is None else "--data is for --resume; give DATA alone")
    if new_data is None and changes:
        raise click.UsageError(f"{_option(next(iter(changes)))} cannot be changed on --resume")
    if (coordinator is None, process_count is None, process_index is None) not in ((True,) * 3, (False,) * 3):
        raise click.UsageError("--coordinator, --process-count and --process-index belong together")
    with stop_on_signals() as stop:
        if coordinator is not None and process_count is not None and process_index is not None:
            join(coordinator, process_count, process_index)
        try:
            if new_data is not None:
                extend_run(out, new_data, changes)
                data = None
            checkpoints = CheckpointConfig(checkpoint_seconds, keep_checkpoints)
            train_run(data, out, model_config, train_config, resume, checkpoints, item_shards, stop)
        except TrainingStopped as stopped:
            click.echo(f"{stopped}; go on with: jaxrec train --out {out} --resume")
        except ProcessLost as lost:
            click.echo(f"Error: another process is gone ({lost}); go on with all of them: --resume", err=True)
            leave_at_once()
        leave()


def _changes_on_resume(context: click.Context, config: TrainConfig) -> dict[str, object]:
    """The options of a run that were given, although it is to go on; those of new data can be others."""
    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    for name in ("batch_tokens", "hidden", "max_length", "seed"):
        if name in given:
            raise click.UsageError(f"{_option(name)} cannot be changed on --resume")
    return {name: getattr(config, name) for name in ("max_epochs", "patience", "learning_rate") if name in given}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


main.add_command(rl)


@main.command()
@click.argument("run", type=EXISTING_FOLDER)
@click.option("--json", "json_file", type=NEW_FILE, help="Where to write the figures as JSON, too.")
@click.option("--seed", type=SEED, default=0, help="Of the bootstrap intervals.")
def evaluate(run: Path, json_file: Path | None, seed: int) -> None:
    """Ranks the test cases of RUN's data with its models, its policy and the baselines, and prints the table."""
    from jaxrec.runs.evaluate import evaluate_run, format_table, write_evaluation

    evaluation = evaluate_run(run, seed)
    click.echo(format_table(evaluation))
    if json_file is not None:
        write_evaluation(evaluation, json_file)


@main.command()
@click.argument("run", type=EXISTING_FOLDER)
@click.option("--out", type=NEW_FOLDER, required=True, help="The model directory; replaced if it exists.")
@click.option("--licence", type=EXISTING_FILE, help="Text about the data's licence, kept with the model.")
@click.option("--int8", is_flag=True, help="Quantize the LSTMs; refused where the answers get worse.")
@click.option(
    "--index",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Whether to add an approximate index of the items; auto: for large catalogues. Refused where it misses too"
    " many of the best items.",
)
def export(run: Path, out: Path, licence: Path | None, int8: bool, index: str) -> None:
    """Exports RUN to ONNX for `python -m serve`; refused where ONNX Runtime and JAX differ."""
    from jaxrec.runs.export import NO_LICENCE, export_run

    text = licence.read_text(encoding="utf-8") if licence else NO_LICENCE
    manifest = export_run(run, out, text, int8, {"auto": None, "always": True, "never": False}[index])
    parity = manifest["parity"]["max_abs_difference"]
    click.echo(f"{out}: model {manifest['model_version']}, policy {manifest['policy']}, within {parity:.1e} of JAX")


@main.command()
@click.option(
    "--out", type=NEW_FOLDER, default=Path("runs/demo"), help="New folder for everything that the demo makes."
)
@click.option("--seed", type=SEED, default=0, help=SEED_HELP)
def demo(out: Path, seed: int) -> None:
    """Does the main job on 100,004 MovieLens ratings: from the log to answers over gRPC."""
    from jaxrec.runs.demo import run_demo

    run_demo(out, seed)


@main.command()
@click.argument("name", type=click.Choice(DATASETS))
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder for NAME.zip and its terms.")
@click.option("--base-url", default=BASE_URL, help="Where NAME.zip lies: GroupLens, or a mirror.")
def fetch(name: str, out: Path, base_url: str) -> None:
    """Downloads the MovieLens data set NAME, verified; a broken download goes on where it stopped."""
    fetch_archive(name, out, base_url, say=click.echo)


main.add_command(prepare_distributed)


if __name__ == "__main__":
    main()

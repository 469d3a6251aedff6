"""`jaxrec train`: its options, and how a run stops, resumes and spreads over processes."""

from pathlib import Path

import click

from jaxrec.cli.options import EXISTING_FOLDER, NEW_FOLDER, SEED, SEED_HELP, given_options, mlflow_option, option_name
from jaxrec.config import CheckpointConfig, ModelConfig, SeenItems, TrainConfig
from jaxrec.errors import ProcessLost, TrainingStopped

FIXED = ("batch_tokens", "hidden", "max_length", "sampled_items", "seed", "seen")  # for the whole life of a run
CHANGEABLE = ("max_epochs", "patience", "learning_rate")  # together with the data


@click.command()
@click.argument("data", type=EXISTING_FOLDER, required=False)
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder for the run.")
@click.option("--resume", is_flag=True, help="Resume an interrupted run, with the options that it started with.")
@click.option(
    "--data",
    "new_data",
    type=EXISTING_FOLDER,
    help="With --resume: continue on this data, from `jaxrec append`, and its new items. Only --max-epochs, --patience "
    "and --learning-rate can change with it.",
)
@click.option(
    "--max-epochs",
    type=click.IntRange(1),
    default=TrainConfig.max_epochs,
    help="Largest number of passes over the training events.",
)
@click.option(
    "--patience",
    type=click.IntRange(1),
    default=TrainConfig.patience,
    help="Training stops after so many epochs without a better validation NDCG@10.",
)
@click.option("--batch-tokens", type=click.IntRange(1), default=TrainConfig.batch_tokens, help="Events per step.")
@click.option(
    "--learning-rate", type=float, default=TrainConfig.learning_rate, help="Peak learning rate, after the warm-up."
)
@click.option("--hidden", type=click.IntRange(1), default=ModelConfig.hidden, help="Width of the LSTM.")
@click.option(
    "--max-length",
    type=click.IntRange(2),
    default=ModelConfig.max_length,
    help="Events of a history that the models read, the most recent ones.",
)
@click.option(
    "--sampled-items",
    type=click.IntRange(0),
    help="Items of a sample that estimates the softmax in a step; 0: it is computed in full.  [default: 0 up to 40,000 "
    "items, 8192 above]",
)
@click.option(
    "--seen",
    type=click.Choice([one.value for one in SeenItems]),
    default=TrainConfig.seen.value,
    help="Whether items of a user's history may be recommended again; auto: if 3 % or more of the validation "
    "targets are such, and at least three quarters as many as by chance.",
)
@click.option("--seed", type=SEED, default=TrainConfig.seed, help=SEED_HELP)
@click.option(
    "--checkpoint-seconds",
    type=click.FloatRange(0),
    default=CheckpointConfig.seconds,
    help="Seconds between two checkpoints within an epoch; one is also saved after each epoch.",
)
@click.option(
    "--keep-checkpoints",
    type=click.IntRange(1),
    default=CheckpointConfig.keep,
    help="Number of latest checkpoints to keep, beside the best epoch's.",
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
@click.option("--process-count", type=click.IntRange(1), envvar="JAX_NUM_PROCESSES", help="Number of processes.")
@click.option("--process-index", type=click.IntRange(0), envvar="JAX_PROCESS_ID", help="Index of this process, from 0.")
@mlflow_option("Track the run")
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
    sampled_items: int | None,
    seen: str,
    seed: int,
    checkpoint_seconds: float,
    keep_checkpoints: int,
    item_shards: int,
    coordinator: str | None,
    process_count: int | None,
    process_index: int | None,
    mlflow: str | None,
) -> None:
    """Trains both sequence models on DATA (from `jaxrec prepare` or `prepare-distributed`) and tunes their mix on
    validation.

    SIGTERM and Ctrl-C save and end the run; --resume continues it with exactly the same result, and needs no DATA.
    """
    model_config = ModelConfig(hidden=hidden, max_length=max_length)
    train_config = TrainConfig(
        seed=seed,
        max_epochs=max_epochs,
        patience=patience,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        sampled_items=sampled_items,
        seen=SeenItems(seen),
    )
    changes = _changes_on_resume(given_options(context), train_config) if resume else {}
    if not resume and (data is None or new_data is not None):
        raise click.UsageError("DATA is missing" if data is None else "--data is for --resume; give DATA alone")
    if new_data is None and changes:
        raise click.UsageError(f"{option_name(next(iter(changes)))} cannot be changed on --resume")
    if (coordinator is None, process_count is None, process_index is None) not in ((True,) * 3, (False,) * 3):
        raise click.UsageError("--coordinator, --process-count and --process-index belong together")

    import jax

    from jaxrec.runs.train import extend_run
    from jaxrec.runs.train import train as train_run
    from jaxrec.training.host_memory import keep_freed_memory
    from jaxrec.training.processes import join, leave, leave_at_once
    from jaxrec.training.stopping import stop_on_signals

    with stop_on_signals() as stop:
        if coordinator is not None and process_count is not None and process_index is not None:
            join(coordinator, process_count, process_index)
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        try:
            if new_data is not None:
                extend_run(out, new_data, changes)
                data = None
            checkpoints = CheckpointConfig(checkpoint_seconds, keep_checkpoints)
            train_run(
                data,
                out,
                model_config,
                train_config,
                resume=resume,
                checkpoint_config=checkpoints,
                item_shards=item_shards,
                stop=stop,
                mlflow=mlflow,
            )
        except TrainingStopped as stopped:
            tracking = "" if mlflow is None else " --mlflow URI"  # which may hold a password
            click.echo(f"{stopped}; resume with: jaxrec train --out {out} --resume{tracking}")
        except ProcessLost as lost:
            click.echo(f"Error: another process is gone ({lost}); resume with all of them: --resume", err=True)
            leave_at_once()
        leave()


def _changes_on_resume(given: list[str], config: TrainConfig) -> dict[str, object]:
    """The given options that differ from then on, with new data. Raises UsageError for one that cannot be changed."""
    for name in FIXED:
        if name in given:
            raise click.UsageError(f"{option_name(name)} cannot be changed on --resume")
    return {name: getattr(config, name) for name in CHANGEABLE if name in given}

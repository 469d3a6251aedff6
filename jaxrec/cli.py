"""The command line: each command is one stage, and does what the function of the same name does from Python."""

from pathlib import Path

import click

from jaxrec.config import ModelConfig, RewardWeights, RLConfig, TrainConfig
from jaxrec.data_commands import append, check, prepare
from jaxrec.distributed.command import prepare_distributed
from jaxrec.export.errors import ExportError
from jaxrec.fetch import BASE_URL, DATASETS
from jaxrec.fetch import fetch as fetch_archive
from jaxrec.runs import train_run
from jaxrec.schema import DataError
from jaxrec.train import TrainingError

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)
SEED = click.IntRange(0)
SEED_HELP = "Of everything random: the same seed on the same machine gives the same result."


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
@click.argument("data", type=EXISTING_FOLDER)
@click.option("--out", type=NEW_FOLDER, required=True, help="Folder for the run.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run, with the options that it started with.")
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
def train(
    data: Path,
    out: Path,
    resume: bool,
    max_epochs: int,
    patience: int,
    batch_tokens: int,
    learning_rate: float,
    hidden: int,
    max_length: int,
    seed: int,
) -> None:
    """Trains both sequence models on DATA (from `jaxrec prepare`) and tunes their mix on validation."""
    model_config = ModelConfig(hidden=hidden, max_length=max_length)
    train_config = TrainConfig(
        seed=seed,
        max_epochs=max_epochs,
        patience=patience,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
    )
    train_run(data, out, model_config, train_config, resume)


@main.command()
@click.argument("run", type=EXISTING_FOLDER)
@click.option("--steps", type=click.IntRange(1), default=RLConfig.steps, help="Updates of the policy.")
@click.option("--learning-rate", type=float, default=RLConfig.learning_rate, help="Of Adam.")
@click.option("--kl-target", type=float, default=RLConfig.kl_target, help="Leash to the supervised policy, in nats.")
@click.option("--hit-reward", type=float, default=RewardWeights.hit, help="Weight: the actual next item.")
@click.option("--genre-reward", type=float, default=RewardWeights.genre, help="Weight: genre cosine with it.")
@click.option("--rating-reward", type=float, default=RewardWeights.rating, help="Weight: rating, 0..1.")
@click.option("--seed", type=SEED, default=RLConfig.seed, help=SEED_HELP)
def rl(
    run: Path,
    steps: int,
    learning_rate: float,
    kl_target: float,
    hit_reward: float,
    genre_reward: float,
    rating_reward: float,
    seed: int,
) -> None:
    """Fine-tunes a policy of RUN (from `jaxrec train`) by policy gradient; it is used only if validation says so."""
    from jaxrec.rl.policy_run import rl_run

    rewards = RewardWeights(hit_reward, genre_reward, rating_reward)
    config = RLConfig(seed=seed, steps=steps, learning_rate=learning_rate, kl_target=kl_target, rewards=rewards)
    click.echo(rl_run(run, config).reason)


@main.command()
@click.argument("run", type=EXISTING_FOLDER)
@click.option("--json", "json_file", type=NEW_FILE, help="Where to write the figures as JSON, too.")
@click.option("--seed", type=SEED, default=0, help="Of the bootstrap intervals.")
def evaluate(run: Path, json_file: Path | None, seed: int) -> None:
    """Ranks the test cases of RUN's data with its models, its policy and the baselines, and prints the table."""
    from jaxrec.report import evaluate_run, format_table, write_evaluation

    evaluation = evaluate_run(run, seed)
    click.echo(format_table(evaluation))
    if json_file is not None:
        write_evaluation(evaluation, json_file)


@main.command()
@click.argument("run", type=EXISTING_FOLDER)
@click.option("--out", type=NEW_FOLDER, required=True, help="The model directory; replaced if it exists.")
@click.option("--licence", type=EXISTING_FILE, help="Text about the data's licence, kept with the model.")
@click.option("--int8", is_flag=True, help="Quantize the LSTMs; refused where the answers get worse.")
def export(run: Path, out: Path, licence: Path | None, int8: bool) -> None:
    """Exports RUN to ONNX for `python -m serve`; refused where ONNX Runtime and JAX differ."""
    from jaxrec.export.run import NO_LICENCE, export_run

    text = licence.read_text(encoding="utf-8") if licence else NO_LICENCE
    manifest = export_run(run, out, text, int8)
    parity = manifest["parity"]["max_abs_difference"]
    click.echo(f"{out}: model {manifest['model_version']}, policy {manifest['policy']}, within {parity:.1e} of JAX")


@main.command()
@click.option(
    "--out", type=NEW_FOLDER, default=Path("runs/demo"), help="New folder for everything that the demo makes."
)
@click.option("--seed", type=SEED, default=0, help=SEED_HELP)
def demo(out: Path, seed: int) -> None:
    """Does the main job on 100,004 MovieLens ratings: from the log to answers over gRPC."""
    from jaxrec.demo import run_demo

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

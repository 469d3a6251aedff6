"""`jaxrec evaluate`."""

from pathlib import Path

import click

from jaxrec.cli.options import EXISTING_FOLDER, NEW_FILE, SEED


@click.command()
@click.argument("run", type=EXISTING_FOLDER)
@click.option("--json", "json_file", type=NEW_FILE, help="File for the figures as JSON, beside RUN/evaluation.json.")
@click.option("--seed", type=SEED, default=0, help="Seed of the bootstrap intervals.")
@click.option(
    "--cases",
    type=click.IntRange(1),
    help="Test cases to rank, evenly spaced. RUN/evaluation.json stays if it has more.  [default: all]",
)
def evaluate(run: Path, json_file: Path | None, seed: int, cases: int | None) -> None:
    """Ranks the test cases of RUN's data with its models, its policy and the baselines, and prints the metrics."""
    from jaxrec.runs.evaluate import evaluate as evaluate_run
    from jaxrec.runs.evaluate import write_evaluation

    evaluation = evaluate_run(run, seed, cases)
    click.echo(str(evaluation))
    if json_file is not None:
        write_evaluation(evaluation, json_file)

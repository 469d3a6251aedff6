"""`jaxrec rl logged|served|simulated`: the options, and what is printed. The commands import what computes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from jaxrec.cli.options import (
    EXISTING_FILE,
    EXISTING_FOLDER,
    EXISTING_PATH,
    SEED,
    SEED_HELP,
    Command,
    Share,
    given_options,
    option_name,
    with_options,
)
from jaxrec.config import Config
from jaxrec.errors import TrainingStopped
from jaxrec.rl.config import PL_RANK, REINFORCE, LoggedConfig, RewardWeights, ServedConfig, SimulatedConfig
from jaxrec.rl.outcome import PolicyOutcome
from jaxrec.training.stopping import stop_on_signals

RUN = click.argument("run", type=EXISTING_FOLDER)
RESUME = click.option(
    "--resume", is_flag=True, help="Continue an interrupted training, with the options that it was started with."
)
COUNT, POSITIVE = click.IntRange(1), click.FloatRange(0, min_open=True)
SHARE, WEIGHT = click.FloatRange(0, 1), click.FloatRange(0)
SHARED: dict[str, tuple[Any, str]] = {
    "updates": (COUNT, "Updates of the policy."),
    "batch_size": (click.IntRange(2), "Logged decisions per update."),
    "slate_size": (COUNT, "Items of a slate."),
    "learning_rate": (POSITIVE, "Peak learning rate of Adam."),
    "kl_target": (POSITIVE, "KL to the policy at the start that the KL penalty is controlled to, in nats."),
    "entropy_floor": (SHARE, "Share of the entropy at the start below which a penalty pulls back."),
    "coverage_floor": (SHARE, "Share of the coverage at the start below which a penalty pulls back."),
    "importance_cap": (click.FloatRange(1, min_open=True), "Largest importance weight."),
    "seed": (SEED, SEED_HELP),
}
REWARDS = {
    "hit": "the actual next item",
    "genre": "genre cosine with the actual next item",
    "rating": "rating, 0..1",
    "centred_rating": "rating less the user's mean rating, 0..1",
    "novelty": "how few users chose the item, 0..1",
    "diversity": "genre distance to the items above, 0..1",
}


def _options(kind: type, **own: tuple[Any, str]) -> Callable[[Command], Command]:
    """An option for each field of the configuration that has a help text in `own` or SHARED, with its default."""
    texts = {**SHARED, **own}
    shown = [(f.name, f.default, *texts[f.name]) for f in dataclasses.fields(kind) if f.name in texts]
    if any(field.name == "rewards" for field in dataclasses.fields(kind)):
        weights = dataclasses.asdict(RewardWeights())
        if kind is LoggedConfig:
            del weights["diversity"]  # depends on the items above, which LoggedConfig refuses
        shown += [(f"{name}_reward", weights[name], float, f"Reward weight: {REWARDS[name]}.") for name in weights]
    return with_options(
        *(click.option(option_name(name), type=kind, default=default, help=text) for name, default, kind, text in shown)
    )


def _config(kind: type[Config], values: dict[str, Any]) -> Config:
    """The configuration of the options' values."""
    rewards = {name: values.pop(f"{name}_reward") for name in REWARDS if f"{name}_reward" in values}
    return kind(**values, **({"rewards": RewardWeights(**rewards)} if rewards else {}))


def _refuse_changes(resume: bool) -> None:
    """Raises UsageError for an option that cannot be changed when a training is resumed."""
    given = given_options(click.get_current_context())
    changed = [name for name in given if name not in ("run", "resume", "simulator")]
    if resume and changed:
        raise click.UsageError(f"{option_name(changed[0])} cannot be changed on --resume")


def _echo(train: Callable[[Any], PolicyOutcome], resume: str = "") -> None:
    """Prints the outcome of train(stop), or where it stopped and the command that resumes it."""
    with stop_on_signals() as stop:
        try:
            outcome = train(stop)
            click.echo(f"{outcome.summary}\n{outcome.reason}".strip())
        except TrainingStopped as stopped:
            click.echo(f"{stopped}; resume with: {resume}" if resume else str(stopped))


@click.group()
def rl() -> None:
    """Fine-tunes a policy of RUN (from `jaxrec train`) by reinforcement learning.

    A new policy is used only if an evaluation on data that it was not trained on shows an improvement; otherwise the
    policy in use stays. `logged` comes first and needs no feedback. `served` and `simulated` train on top of it and
    start from the policy in use, so that they can follow one another in any order.

    The intervals of these evaluations are valid for a single run. Trying several options until one passes inflates
    false positives.
    """


@rl.command()
@RUN
@RESUME
@_options(
    LoggedConfig,
    method=(
        click.Choice((PL_RANK, REINFORCE)),
        "Gradient of the slate's reward: PL-Rank-2, or REINFORCE with the other samples as baseline.",
    ),
    folds=(click.IntRange(2), "Parts of the users; each is scored by models that were trained on the others."),
    fold_epochs=(COUNT, "Epochs of these models."),
    events=(COUNT, "Last training events of each user to learn from."),
    decisions=(COUNT, "Most events to learn from in all."),
    penalty=(WEIGHT, "Of the squared weights."),
    reward_weight=(WEIGHT, "Weight of the slate's reward, beside the cross-entropy of the next item."),
    ndcg_budget=(
        Share(),
        "What the rewards may cost of NDCG@10 for held-out users, such as 1%. Instead of --reward-weight, the weight "
        "that earns most within it is then chosen from five, with five more fits for each fold.",
    ),
    samples=(COUNT, "Rankings drawn for each event and update."),
)
def logged(run: Path, resume: bool, **values: Any) -> None:
    """Trains a policy on the log that RUN was trained on: it reranks the 100 best items of RUN's mix.

    It learns from events of users that the models behind them were not trained on (cross-fitting), which takes about as
    long as the training of RUN. It is used if it improves NDCG@10 and slate reward significantly for other held-out
    users, and NDCG@10 does not fall significantly on validation. `rl served` and `rl simulated` train on top of it.
    SIGTERM and Ctrl-C end the training; --resume continues with exactly the same result.
    """
    _refuse_changes(resume)
    from jaxrec.runs.directory import open_run
    from jaxrec.runs.rl_logged import run_logged

    given = given_options(click.get_current_context())
    if "ndcg_budget" in given and "reward_weight" in given:
        raise click.UsageError("--ndcg-budget chooses the weight that --reward-weight sets; give one of them")
    try:
        config = _config(LoggedConfig, values)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    _echo(lambda stop: run_logged(open_run(run), config, resume, stop), f"jaxrec rl logged {run} --resume")


@rl.command()
@RUN
@click.option(
    "--log",
    type=EXISTING_FILE,
    metavar="EVENTS",
    required=True,
    help="A server's event store (SQLite).",
)
@_options(
    ServedConfig,
    attribution_window=(
        click.IntRange(0),
        "Seconds within which an event counts as a response to the recommendation that it names. Recommendations too "
        "recent to have had that long are left out.  [default: the 99th percentile of the log]",
    ),
    minimum_effective=(POSITIVE, "Refuse the policy if its effective sample size, in users, is smaller."),
)
def served(run: Path, log: Path, **values: Any) -> None:
    """Improves the policy in use from what a server recommended (`python -m serve run --explore`) and its responses.

    Half of the log's users train. The new policy is used if off-policy evaluation on the other half shows a gain. A
    training that is stopped leaves nothing.
    """
    from jaxrec.runs.policy import load_run
    from jaxrec.runs.rl_served import run_served

    config = _config(ServedConfig, values)
    _echo(lambda stop: run_served(load_run(run), log, config, stop))


@rl.command()
@RUN
@click.option(
    "--simulator",
    type=EXISTING_PATH,
    metavar="RATINGS",
    required=True,
    help="A log of ratings by users that RUN was not trained on.",
)
@RESUME
@_options(
    SimulatedConfig,
    users=(click.IntRange(2), "Simulated users per update."),
    discount=(SHARE, "Discount of the reward one request later."),
    likelihood_budget=(
        WEIGHT,
        "Nats that real events of the people whose simulated copies train may lose in log-likelihood. The weight of "
        "the KL penalty is controlled to that.",
    ),
    temperature=(POSITIVE, "Temperature that slates are drawn at, as by the server's --explore."),
)
def simulated(run: Path, simulator: Path, resume: bool, **values: Any) -> None:
    """Improves the policy in use with simulated users, fitted on RATINGS.

    Half of the users in RATINGS train, the others evaluate, simulated by a different model; the halves do not depend on
    the options. The new policy is used if it (a) earns more reward from the users that evaluate and (b) loses no more
    than 1 % NDCG@10 on RUN's validation events, with no significant drop, compared with the supervised models. SIGTERM
    and Ctrl-C save and end the training; --resume continues with exactly the same result.
    """
    _refuse_changes(resume)
    from jaxrec.runs.policy import load_run
    from jaxrec.runs.rl_simulated import run_simulated

    try:
        config = _config(SimulatedConfig, values)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    again = f"jaxrec rl simulated {run} --resume --simulator {simulator}"
    _echo(lambda stop: run_simulated(load_run(run), simulator, config, resume, stop), again)

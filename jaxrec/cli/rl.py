"""`jaxrec rl`: its options, and what it prints."""

from pathlib import Path

import click
from click.core import ParameterSource

from jaxrec.config import LOG_RL, SIMULATOR_RL, RewardWeights, RLConfig
from jaxrec.errors import TrainingStopped
from jaxrec.training.stopping import stop_on_signals

SEED = click.IntRange(0)
SEED_HELP = "Of everything random: the same seed on the same machine gives the same result."
POSITIVE = click.FloatRange(0, min_open=True)
SHARE = click.FloatRange(0, 1)
ONLY_WITH_LOG: tuple[str, ...] = ("answers_within", "min_effective")
ONLY_WITH_SIMULATOR: tuple[str, ...] = ("temperature",)
NOT_WITH_LOG = ("objective", "slate_size", "samples", "anchor", "discount", "resume")
REWARDS = tuple(
    f"{name}_reward" for name in ("hit", "genre", "rating", "centred_rating", "novelty", "diversity")
)  # simulated users have a reward of their own
NOT_WITH_SIMULATOR = (
    "objective",
    "log",
    "samples",
    "entropy_floor",
    "coverage_floor",
    "importance_cap",
    *REWARDS,
)
OBJECTIVES = ("reinforce", "plackett-luce", "top-k", "actor-critic")


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default=OBJECTIVES[0],
    help="REINFORCE with a learned baseline; Plackett-Luce with the other samples as baseline; off-policy from the "
    "logged items with top-K correction; actor-critic with advantages over sampled items.",
)
@click.option(
    "--log",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="EVENTS",
    help="A server's event store (SQLite): improve the policy in use from what was shown and what came of it.",
)
@click.option(
    "--answers-within",
    type=click.IntRange(0),
    metavar="SECONDS",
    help="With --log: so long after a recommendation its answers count.  [default: within which 99 % of them came]",
    show_default=False,
)
@click.option(
    "--simulator",
    type=click.Path(exists=True, path_type=Path),
    metavar="RATINGS",
    help="A log of other people than those that RUN was trained on: improve the policy in use by playing simulated "
    "users who are fitted on it.",
)
@click.option(
    "--temperature",
    type=POSITIVE,
    help="With --simulator: at which slates are drawn, as the server's --explore does.  [default: 0.5]",
    show_default=False,
)
@click.option(
    "--min-effective",
    type=POSITIVE,
    default=100.0,
    help="With --log: refuse a policy where fewer users than that, effectively, judge it.",
)
@click.option(
    "--resume", is_flag=True, help="Go on with an interrupted training, with the options that it started with."
)
@click.option("--steps", type=click.IntRange(1), default=RLConfig.steps, help="Updates of the policy.")
@click.option(
    "--batch-size",
    type=click.IntRange(2),
    default=RLConfig.batch_size,
    help="Logged decisions per update; with --simulator: users who play at once.",
)
@click.option("--slate-size", type=click.IntRange(1), default=RLConfig.slate_size, help="Items of a slate.")
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=RLConfig.samples,
    help="Slates drawn for each decision, at least; plackett-luce draws 4.",
)
@click.option(
    "--learning-rate",
    type=POSITIVE,
    help=f"Of Adam, its peak.  [default: {RLConfig.learning_rate:g}, with --log {LOG_RL.learning_rate:g}, with "
    f"--simulator {SIMULATOR_RL.learning_rate:g}]",
    show_default=False,
)
@click.option(
    "--kl-target",
    type=POSITIVE,
    help=f"Leash to the policy before, in nats.  [default: {RLConfig.kl_target:g}, with --log {LOG_RL.kl_target:g}, "
    f"with --simulator {SIMULATOR_RL.kl_target:g}]",
    show_default=False,
)
@click.option(
    "--anchor",
    type=click.FloatRange(0),
    help="Weight of the rating-weighted cross-entropy of the logged items beside the reward; with --simulator, of the "
    f"KL to the policy before where the run's own users were.  [default: {RLConfig.anchor:g}, with --simulator "
    f"{SIMULATOR_RL.anchor:g}]",
    show_default=False,
)
@click.option(
    "--entropy-floor", type=SHARE, default=RLConfig.entropy_floor, help="Share of the entropy at the start to keep."
)
@click.option(
    "--coverage-floor", type=SHARE, default=RLConfig.coverage_floor, help="Share of the coverage at the start to keep."
)
@click.option(
    "--discount",
    type=SHARE,
    default=RLConfig.discount,
    help="Of the reward one event later, for actor-critic, or with --simulator one request later.",
)
@click.option(
    "--importance-cap",
    type=click.FloatRange(1, min_open=True),
    help=f"Largest importance weight.  [default: {RLConfig.importance_cap:g}, with --log {LOG_RL.importance_cap:g}]",
    show_default=False,
)
@click.option("--hit-reward", type=float, default=RewardWeights.hit, help="Weight: the actual next item.")
@click.option("--genre-reward", type=float, default=RewardWeights.genre, help="Weight: genre cosine with it.")
@click.option("--rating-reward", type=float, default=RewardWeights.rating, help="Weight: rating, 0..1.")
@click.option(
    "--centred-rating-reward",
    type=float,
    default=RewardWeights.centred_rating,
    help="Weight: rating beside the mean of the user's ratings, 0..1.",
)
@click.option(
    "--novelty-reward", type=float, default=RewardWeights.novelty, help="Weight: how few took the item, 0..1."
)
@click.option(
    "--diversity-reward",
    type=float,
    default=RewardWeights.diversity,
    help="Weight: how unlike the items above it in genres, 0..1.",
)
@click.option("--seed", type=SEED, default=RLConfig.seed, help=SEED_HELP)
@click.pass_context
def rl(
    context: click.Context,
    run: Path,
    objective: str,
    log: Path | None,
    answers_within: int | None,
    simulator: Path | None,
    temperature: float | None,
    min_effective: float,
    resume: bool,
    steps: int,
    batch_size: int,
    slate_size: int,
    samples: int,
    learning_rate: float | None,
    kl_target: float | None,
    anchor: float | None,
    entropy_floor: float,
    coverage_floor: float,
    discount: float,
    importance_cap: float | None,
    hit_reward: float,
    genre_reward: float,
    rating_reward: float,
    centred_rating_reward: float,
    novelty_reward: float,
    diversity_reward: float,
    seed: int,
) -> None:
    """Fine-tunes a policy of RUN (from `jaxrec train`) by policy gradient.

    It is used only if validation shows that it is better than the supervised models; otherwise a policy that was in use
    before stays. SIGTERM and Ctrl-C save and end the training; --resume goes on with exactly the same result.

    With --log the policy in use learns from what a server showed, and is replaced only if off-policy evaluation on
    other users of the log shows that the new one is better; a training that is ended then leaves nothing. The interval
    is that of one try: whoever repeats it with other options until one passes is fooled by chance.

    With --simulator the policy in use plays users simulated from half of the people in RATINGS, and is replaced only if
    the new one earns more from users simulated, in another way, from the other half, and its NDCG@10 on validation is
    not shown to be lower than that of the supervised models, and at most 1 % lower.
    Both start from the policy in use: one after the other, a policy learns from either. That interval is of one try
    too: the people of RATINGS who judge are the same whatever the options and the seed.
    """
    from jaxrec.rl.logged.methods import METHODS
    from jaxrec.rl.simulated.policy import TEMPERATURE
    from jaxrec.runs.rl_logged import rl_run
    from jaxrec.runs.rl_served import rl_log_run
    from jaxrec.runs.rl_simulated import rl_simulator_run

    given = [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if resume and (changed := [name for name in given if name not in ("run", "resume", "simulator")]):
        raise click.UsageError(f"--{changed[0].replace('_', '-')} cannot be changed on --resume")
    rewards = RewardWeights(
        hit_reward, genre_reward, rating_reward, centred_rating_reward, novelty_reward, diversity_reward
    )
    defaults = LOG_RL if log is not None else SIMULATOR_RL if simulator is not None else RLConfig()
    config = RLConfig(
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        slate_size=slate_size,
        samples=samples,
        learning_rate=learning_rate or defaults.learning_rate,
        kl_target=kl_target or defaults.kl_target,
        anchor=defaults.anchor if anchor is None else anchor,
        entropy_floor=entropy_floor,
        coverage_floor=coverage_floor,
        discount=discount,
        importance_cap=importance_cap or defaults.importance_cap,
        rewards=rewards,
    )
    _refuse_senseless(given, log is not None, simulator is not None)
    again = f"jaxrec rl {run} --resume" + (f" --simulator {simulator}" if simulator is not None else "")
    with stop_on_signals() as stop:
        try:
            if log is not None:
                found = rl_log_run(run, log, config, answers_within, min_effective, stop)
                click.echo(f"{found.told}\n{found.reason}")
            elif simulator is not None:
                found = rl_simulator_run(run, simulator, config, temperature or TEMPERATURE, resume, stop)
                click.echo(f"{found.told}\n{found.reason}")
            else:
                click.echo(rl_run(run, config, METHODS[objective], resume, stop).reason)
        except TrainingStopped as stopped:
            click.echo(str(stopped) if log else f"{stopped}; go on with: {again}")


def _refuse_senseless(given: list[str], log: bool, simulator: bool) -> None:
    """Raises UsageError for an option on the command line that has no meaning beside the others."""
    for only, there, names in (("log", log, ONLY_WITH_LOG), ("simulator", simulator, ONLY_WITH_SIMULATOR)):
        if not there and (senseless := [name for name in names if name in given]):
            raise click.UsageError(f"--{senseless[0].replace('_', '-')} is for --{only}")
    for beside, there, names in (("simulator", simulator, NOT_WITH_SIMULATOR), ("log", log, NOT_WITH_LOG)):
        if there and (senseless := [name for name in names if name in given]):
            raise click.UsageError(f"--{senseless[0].replace('_', '-')} has no meaning with --{beside}")

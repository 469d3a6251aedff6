"""Reinforcement learning of a run's policy from Python; `jaxrec rl` on the command line."""

from pathlib import Path

from jaxrec.rl.config import LoggedConfig, ServedConfig, SimulatedConfig
from jaxrec.rl.outcome import PolicyOutcome
from jaxrec.runs.directory import Run, open_run
from jaxrec.runs.policy import load_run
from jaxrec.runs.rl_logged import run_logged
from jaxrec.runs.rl_served import run_served
from jaxrec.runs.rl_simulated import run_simulated
from jaxrec.training.stopping import StopRequested, never


def fine_tune(
    run: Run | Path | str,
    config: LoggedConfig | ServedConfig | SimulatedConfig | None = None,
    *,
    log: Path | str | None = None,
    simulator: Path | str | None = None,
    resume: bool = False,
    stop: StopRequested = never,
) -> PolicyOutcome:
    """Trains a policy, and uses it from then on if an evaluation on held-out data shows that it is better.

    Args:
        run: A run or its folder; its policy files are written.
        config: Updates, learning rate, reward weights, of the class that fits what is learned from: LoggedConfig,
            ServedConfig with `log`, SimulatedConfig with `simulator`. None: its defaults.
        log: A server's event store (SQLite): learn from what was recommended and how users responded.
        simulator: A log of other people's ratings: learn from users who are simulated after them. Without `log` and
            `simulator` the policy learns from the run's own log.
        resume: Continue an interrupted training; not with `log`.
        stop: Asked between updates; training ends once it is true, and is saved (not with `log`).

    Returns:
        `used`, whether the new policy is used from now on, and `reason`, why or why not, with the figures.

    Raises:
        ValueError: `log`, `simulator`, `resume` and `config` do not fit together.
        DataError: The run or the log cannot be read, or there is nothing to learn from.
        TrainingError: A metric is not finite.
        TrainingStopped: `stop()` became true.
    """
    if log is not None and (simulator is not None or resume):
        raise ValueError(f"{'simulator' if simulator is not None else 'resume'} has no meaning with log")
    expected = ServedConfig if log is not None else SimulatedConfig if simulator is not None else LoggedConfig
    config = expected() if config is None else config
    if not isinstance(config, expected):
        raise ValueError(f"config is a {type(config).__name__}, expected a {expected.__name__}")
    run = open_run(run)
    if isinstance(config, LoggedConfig):
        return run_logged(run, config, resume, stop)
    loaded = load_run(run.folder)
    if isinstance(config, ServedConfig):
        return run_served(loaded, Path(str(log)), config, stop)
    return run_simulated(loaded, Path(str(simulator)), config, resume, stop)

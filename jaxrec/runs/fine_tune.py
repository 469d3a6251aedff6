"""Reinforcement learning of a run's policy from Python; `jaxrec rl` on the command line."""

from pathlib import Path

from jaxrec.config import LOG_RL, SIMULATOR_RL, RLConfig
from jaxrec.errors import DataError
from jaxrec.rl.logged.train import PolicyOutcome
from jaxrec.runs.directory import Run, open_run
from jaxrec.runs.policy import GateOutcome
from jaxrec.runs.rl_logged import rl_run
from jaxrec.runs.rl_served import rl_log_run
from jaxrec.runs.rl_simulated import rl_simulator_run
from jaxrec.training.stopping import StopRequested, never


def fine_tune(
    run: Run | Path | str,
    config: RLConfig | None = None,
    *,
    log: Path | str | None = None,
    simulator: Path | str | None = None,
    resume: bool = False,
    stop: StopRequested = never,
) -> PolicyOutcome | GateOutcome:
    """Trains a policy, and uses it from then on if an evaluation on held-out data shows that it is better.

    Args:
        run: A run or its folder; its policy files are written.
        config: Steps, learning rate, reward weights; None: the defaults of the kind of training.
        log: A server's event store (SQLite): learn from what was recommended and how users responded.
        simulator: A log of other people's ratings: learn from users who are simulated after them. Without `log` and
            `simulator` the policy learns from the run's own log.
        resume: Continue an interrupted training; not with `log`.
        stop: Asked between steps; training ends once it is true, and is saved (not with `log`).

    Returns:
        `used`, whether the new policy is used from now on, and `reason`, why or why not, with the figures.

    Raises:
        DataError: The run or the log cannot be read, or there is nothing to learn from.
        TrainingError: A figure is not finite.
        TrainingStopped: `stop()` became true.
    """
    folder = open_run(run).folder
    if log is not None and (simulator is not None or resume):
        raise DataError(f"{'simulator' if simulator is not None else 'resume'} has no meaning with log")
    if log is not None:
        return rl_log_run(folder, Path(log), config or LOG_RL, stop=stop)
    if simulator is not None:
        return rl_simulator_run(folder, Path(simulator), config or SIMULATOR_RL, resume=resume, stop=stop)
    return rl_run(folder, config or RLConfig(), resume=resume, stop=stop)

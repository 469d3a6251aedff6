"""`jaxrec rl logged RUN`: learns by cross-fitting to rerank the best items of the run's mix."""

import dataclasses
import json
import shutil
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from jaxrec.config import TrainConfig, to_json
from jaxrec.data.prepared import PreparedData
from jaxrec.errors import DataError
from jaxrec.evaluation.plots import reranker_figure, save_plot
from jaxrec.files import new_file, write_text
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.neighbours import initial_embedding, neighbours
from jaxrec.models.reranker import Reranker, RerankerTables
from jaxrec.rl.checkpoint import PolicyCheckpoint, models_digest
from jaxrec.rl.config import LoggedConfig
from jaxrec.rl.logged.decisions import Decisions, decide
from jaxrec.rl.logged.fit import Fitted
from jaxrec.rl.logged.folds import fold_of_users, last_events, without_users
from jaxrec.rl.logged.learn import Learned, learn_reranker
from jaxrec.rl.logged.tables import with_reranker
from jaxrec.rl.outcome import PolicyOutcome
from jaxrec.runs.directory import (
    CONTENT_FOLDER,
    EVALUATION_FILE,
    LSTM_FOLDER,
    RERANKER_FILE,
    RERANKER_OUTCOME_FILE,
    RERANKER_PARTIAL_FOLDER,
    RERANKER_PLOT_FILE,
    RERANKER_REFUSED_FILE,
    RERANKER_REFUSED_PLOT_FILE,
    Run,
    load_supervised,
    new_models,
    read_reranker,
)
from jaxrec.runs.policy import require_no_policy
from jaxrec.training.loop import train_model
from jaxrec.training.new_items import new_items
from jaxrec.training.stopping import StopRequested, never

DECISIONS_FILE = "decisions.npz"


def run_logged(
    run: Run, config: LoggedConfig = LoggedConfig(), resume: bool = False, stop: StopRequested = never
) -> PolicyOutcome:
    """Cross-fits a reranker, and uses it from then on if it ranks better for held-out users.

    RUN/reranker.json says whether, with the figures, and RUN/reranker.png shows them. RUN/reranker.npz holds it,
    whether it is used or not, for `jaxrec evaluate`. If it is refused while another one is in use, that one and its
    files stay, and RUN/reranker.refused.json and RUN/reranker.refused.png have the figures.

    Each fold's models are trained in RUN/reranker.partial/, which is removed at the end.

    Args:
        run: A run without a policy in use (`jaxrec rl served`, `simulated`).
        config: Of the folds, the decisions and the fit.
        resume: Continue an interrupted training, with the configuration that it started with.
        stop: Asked between steps; the folds that are finished stay, and so do the checkpoints of the one under way.

    Returns:
        Whether the reranker is used, and why, with the figures.

    Raises:
        DataError: The run has a policy in use, which was trained on top of the models as they are now; or nothing is
            there to resume, or a fold has no decision.
        TrainingError: A loss is not finite.
        TrainingStopped: `stop()` was true.
    """
    data = run.read_data()
    supervised = load_supervised(run, data, reranker=False)
    before = _in_use(run, supervised)
    require_no_policy(run, supervised.with_reranker(before))
    checkpoint = PolicyCheckpoint(run.folder / RERANKER_PARTIAL_FOLDER)
    if resume:
        config = checkpoint.configuration(LoggedConfig)
    else:
        checkpoint.remove()
    checkpoint.open({"configuration": to_json(config), "models": models_digest(supervised)})
    fold = fold_of_users(data.histories.user_count, config)
    folds = [_fold_decisions(run, supervised, data, fold, number, config, stop) for number in range(config.folds)]
    own = with_reranker(supervised, data)
    cases = data.split.validation.at_most(config.decisions // config.folds)
    validation = decide(own, data, cases, run.counts, np.arange(len(cases)) % 2 == 0)
    in_use = None if before is None else Fitted(before.scales, before.weights, [])
    learned = learn_reranker(folds, validation, data, config, stop, in_use)
    assert own.reranker is not None
    require_no_policy(run, supervised.with_reranker(_in_use(run, supervised)))  # another training may have ended
    record = {
        "configuration": to_json(config),
        **dataclasses.asdict(learned.outcome),
        "reward_weight": learned.reward_weight,
        "curves": [point._asdict() for point in learned.curves],
        "frontier": [point._asdict() for point in learned.frontier],
    }
    if not learned.outcome.used and before is not None:
        figures, plot = RERANKER_REFUSED_FILE, RERANKER_REFUSED_PLOT_FILE
    else:
        figures, plot = RERANKER_OUTCOME_FILE, RERANKER_PLOT_FILE
        (run.folder / EVALUATION_FILE).unlink(missing_ok=True)  # its figures are of the run before
        write_reranker(run, supervised, jax.tree.map(np.asarray, own.reranker.tables), learned)
    write_text(run.folder / figures, json.dumps(record, indent=2) + "\n")
    shutil.rmtree(checkpoint.folder)
    save_plot(reranker_figure(record["curves"], record["frontier"]), run.folder / plot)
    return learned.outcome


def _in_use(run: Run, supervised: Hybrid) -> Reranker | None:
    """The reranker that the run uses. One that cannot be read, or is of other models, is not in use."""
    try:
        learned = read_reranker(run, supervised)
    except DataError:
        return None
    return None if learned is None or not learned.used else learned.policy


def write_reranker(run: Run, supervised: Hybrid, tables: RerankerTables, learned: Learned) -> None:
    """Replaces RUN/reranker.npz, as `jaxrec.runs.directory.read_reranker` reads it."""
    of_stacked = {f"stacked_{name}": array for name, array in learned.stacked.weights._asdict().items()}
    arrays = tables._asdict() | learned.policy.scales._asdict() | learned.policy.weights._asdict() | of_stacked
    with new_file(run.folder / RERANKER_FILE) as temporary, temporary.open("wb") as file:
        np.savez(file, models=models_digest(supervised), used=learned.outcome.used, **arrays)


def _fold_decisions(
    run: Run,
    like: Hybrid,
    data: PreparedData,
    fold: np.ndarray,
    number: int,
    config: LoggedConfig,
    stop: StopRequested,
) -> Decisions:
    """The decisions of one fold's users by models of the others, in the mix of `like`; from the file if they were
    made before."""
    folder = run.folder / RERANKER_PARTIAL_FOLDER / f"fold-{number}"
    done = folder / DECISIONS_FILE
    if not done.is_file():
        held_out = fold == number
        cases = last_events(
            data.histories,
            np.where(held_out, data.split.train_counts, 0),
            config.events,
            config.decisions // config.folds,
        )
        others = without_users(data, held_out)
        if not len(cases) or not len(others.split.validation):
            raise DataError(
                f"{run.folder}: part {number + 1} of {config.folds} has {len(cases)} decisions, and the other parts "
                f"have {len(others.split.validation)} validation events; expected at least one of each: the log has "
                "too few users with two training events, choose fewer parts (--folds)"
            )
        progress = f"fold {number + 1} of {config.folds}: {len(cases)} decisions of {int(held_out.sum())} users"
        tqdm.write(progress, file=sys.stderr)  # beside the bars
        hybrid = _fold_models(run.train_config, like, others, folder, config, stop)
        found = decide(with_reranker(hybrid, others), data, cases, run.counts, np.arange(len(cases)) % 2 == 0)
        with new_file(done) as temporary, temporary.open("wb") as file:
            np.savez(file, **found._asdict())
    try:
        with np.load(done, allow_pickle=False) as arrays:
            return Decisions(**arrays)
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{done}: damaged ({error}); remove it and resume") from error


def _fold_models(
    train_config: TrainConfig,
    like: Hybrid,
    data: PreparedData,
    folder: Path,
    config: LoggedConfig,
    stop: StopRequested,
) -> Hybrid:
    """The mix of `like` over models that are trained on `data`; an interrupted training resumes in `folder`."""
    near = neighbours(data)
    start = initial_embedding(near, like.lstm.config.embedding)
    lstm, content = new_models(data, like.lstm.config, train_config.seed, start)
    fewer = dataclasses.replace(train_config, max_epochs=config.fold_epochs, patience=config.fold_epochs)
    names = f"{folder.name} TimeRatingAwareLSTM", f"{folder.name} TimeRatingAwareContentModel"
    of_lstm = train_model(lstm, data, fewer, folder / LSTM_FOLDER, names[0], stop=stop)
    of_content = train_model(content, data, fewer, folder / CONTENT_FOLDER, names[1], stop=stop)
    models = of_lstm.model, of_content.model, CoOccurrence(near)
    return Hybrid(*models, like.mix_weights(), like.trend, new_items=new_items(data), repeat=like.repeat)

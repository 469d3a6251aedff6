"""`jaxrec rl rerank RUN`: learns by cross-fitting to rerank the best items of the run's mix."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from jaxrec.config import TrainConfig, to_json
from jaxrec.data.prepared import PreparedData
from jaxrec.errors import DataError
from jaxrec.files import new_file, write_text
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.neighbours import MAX_START_ITEMS, initial_embedding, neighbours
from jaxrec.rl.checkpoint import PolicyCheckpoint, models_digest
from jaxrec.rl.config import RerankingConfig
from jaxrec.rl.outcome import PolicyOutcome
from jaxrec.rl.reranking.decisions import Decisions, decide
from jaxrec.rl.reranking.folds import fold_of_users, held_out_cases, without_users
from jaxrec.rl.reranking.learn import learn_reranker
from jaxrec.rl.reranking.tables import with_reranker
from jaxrec.runs.directory import (
    CONTENT_FOLDER,
    EVALUATION_FILE,
    LSTM_FOLDER,
    RERANKER_FILE,
    RERANKER_OUTCOME_FILE,
    RERANKER_PARTIAL_FOLDER,
    Run,
    load_supervised,
    new_models,
)
from jaxrec.runs.policy import digest_in_use
from jaxrec.training.loop import train_model
from jaxrec.training.new_items import new_items
from jaxrec.training.stopping import StopRequested, never

DECISIONS_FILE = "decisions.npz"


def run_reranking(
    run: Run, config: RerankingConfig = RerankingConfig(), resume: bool = False, stop: StopRequested = never
) -> PolicyOutcome:
    """Cross-fits a reranker, and uses it from then on if it ranks better for held-out users.

    Each fold's models are trained in RUN/reranker.partial/, which is removed at the end.

    Args:
        run: A run without a policy in use.
        config: Of the folds, the decisions and the fit.
        resume: Continue an interrupted training, with the configuration that it started with.
        stop: Asked between steps; the folds that are finished stay, and so do the checkpoints of the one under way.

    Returns:
        Whether the reranker is used, and why, with the figures. RUN/reranker.json holds it.

    Raises:
        DataError: The run has a policy in use, which was trained on the logits of the mix; or nothing is there to
            resume, or a fold has no decision.
        TrainingError: A loss is not finite.
        TrainingStopped: `stop()` was true.
    """
    if digest_in_use(run) is not None:
        raise DataError(f"{run.folder} has a policy in use, which was trained on the mix without a reranker")
    data = run.read_data()
    supervised = load_supervised(run, data, reranker=False)
    checkpoint = PolicyCheckpoint(run.folder / RERANKER_PARTIAL_FOLDER)
    if resume:
        config = checkpoint.configuration(RerankingConfig)
    else:
        checkpoint.remove()
    checkpoint.open({"configuration": to_json(config), "models": models_digest(supervised)})
    fold = fold_of_users(data.histories.user_count, config)
    folds = [_fold_decisions(run, supervised, data, fold, number, config, stop) for number in range(config.folds)]
    own = with_reranker(supervised, data)
    cases = data.split.validation.at_most(config.decisions // config.folds)
    validation = decide(own, data, cases, run.counts, np.arange(len(cases)) % 2 == 0)
    fitted, outcome = learn_reranker(folds, validation, data, config, stop)
    path = run.folder / RERANKER_FILE
    if outcome.used:
        assert own.reranker is not None
        tables = jax.tree.map(np.asarray, own.reranker.tables)
        arrays = tables._asdict() | fitted.scales._asdict() | fitted.weights._asdict()
        # Scales and tables have no field of the same name.
        with new_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, models=models_digest(supervised), **arrays)
    else:
        path.unlink(missing_ok=True)
    record = {"configuration": to_json(config), **dataclasses.asdict(outcome)}
    write_text(run.folder / RERANKER_OUTCOME_FILE, json.dumps(record, indent=2) + "\n")
    (run.folder / EVALUATION_FILE).unlink(missing_ok=True)  # its figures are of the run before
    shutil.rmtree(checkpoint.folder)
    return outcome


def _fold_decisions(
    run: Run,
    like: Hybrid,
    data: PreparedData,
    fold: np.ndarray,
    number: int,
    config: RerankingConfig,
    stop: StopRequested,
) -> Decisions:
    """The decisions of one fold's users by models of the others, in the mix of `like`; read where they are there."""
    folder = run.folder / RERANKER_PARTIAL_FOLDER / f"fold-{number}"
    done = folder / DECISIONS_FILE
    if not done.is_file():
        held_out = fold == number
        cases = held_out_cases(data, held_out, config)
        others = without_users(data, held_out)
        if not len(cases) or not len(others.split.validation):
            raise DataError(
                f"fold {number} has {len(cases)} decisions and {len(others.split.validation)} validation cases"
            )
        tqdm.write(f"fold {number + 1} of {config.folds}: {len(cases)} decisions of {int(held_out.sum())} users")
        hybrid = _fold_models(run.train_config, like, others, folder, config, stop)
        found = decide(with_reranker(hybrid, others), data, cases, run.counts, np.arange(len(cases)) % 2 == 0)
        with new_file(done) as temporary, temporary.open("wb") as file:
            np.savez(file, **found._asdict())
    with np.load(done, allow_pickle=False) as arrays:
        return Decisions(**arrays)


def _fold_models(
    train_config: TrainConfig,
    like: Hybrid,
    data: PreparedData,
    folder: Path,
    config: RerankingConfig,
    stop: StopRequested,
) -> Hybrid:
    """The mix of `like` over models that are trained on `data`; an interrupted training resumes in `folder`."""
    near = neighbours(data)
    start = None
    if len(data.catalog) <= MAX_START_ITEMS:
        start = initial_embedding(near, like.lstm.config.embedding)
    lstm, content = new_models(data, like.lstm.config, train_config.seed, start)
    fewer = dataclasses.replace(train_config, max_epochs=config.fold_epochs, patience=config.fold_epochs)
    names = f"{folder.name} TimeRatingAwareLSTM", f"{folder.name} TimeRatingAwareContentModel"
    of_lstm = train_model(lstm, data, fewer, folder / LSTM_FOLDER, names[0], stop=stop)
    of_content = train_model(content, data, fewer, folder / CONTENT_FOLDER, names[1], stop=stop)
    models = of_lstm.model, of_content.model, CoOccurrence(near)
    return Hybrid(*models, like.mix_weights(), like.trend, new_items=new_items(data), repeat=like.repeat)

"""The run directory: every file that `jaxrec train`, `jaxrec rl` and `jaxrec evaluate` write, and how it is read.

RUN/data/                       the prepared data, where `jaxrec.train` got it in memory or as a log to prepare
RUN/run.json                    where the data is, and the configurations
RUN/lstm/                       checkpoints and logs of TimeRatingAwareLSTM (`jaxrec.training.log`)
RUN/content/                    the same of TimeRatingAwareContentModel
RUN/training.png                loss and validation figures by epoch
RUN/cooccurrence.npz            the neighbours of each item, and the item vectors that training started from
RUN/cooccurrence.partial/       while several processes count: what they hand each other
RUN/content_head.npz            what gives items without training events their vectors and biases: the features' names,
                                and a kernel and an offset for each model (`jaxrec.training.content_head`)
RUN/hybrid.json                 the weights of the mix (`jaxrec.training.mix.Mix`), with its validation figures;
                                `new_items`: how high the items without training events rank, and `hidden_items`: how
                                high those will that come after the training (`jaxrec.training.new_items`)
RUN/reranker.npz                the reranker that `jaxrec rl logged` learned, whether it is used, and the one that only
                                imitates
RUN/reranker.json               whether it is used and why, the figures, their course and frontier, the configuration
RUN/reranker.png                course and frontier as a plot
RUN/reranker.refused.json       the same figures of one that was refused while another one is in use, which stays
RUN/reranker.refused.png        their course and frontier as a plot
RUN/reranker.partial/           where an interrupted `jaxrec rl logged` stands: one folder for each fold
RUN/mlflow.json                 which run of MLflow this one is, and of which data version (`jaxrec.runs.tracking`)
RUN/evaluation.json             written by `jaxrec evaluate`; goes into the manifest of the exported model
RUN/policy/                     the policy that `jaxrec rl served` or `simulated` trained last, on top of the reranker:
    policy.json                 whether the policy is used and why, the figures, the configuration, its models' digest
    policy.npz                  the variables of PolicyHead, after the last update; with a reranker also the shift of
                                its weights
    steps.jsonl                 one record per update; of a policy from simulated users, one per 10 updates
    training.png                the same as a plot
RUN/policy.previous/            the policy that was in use before, where there was one
RUN/policy.simulator.partial/   where an interrupted training with simulated users stands
RUN/policy_from_log.json        the outcome of the last training on a server's log
RUN/policy_from_simulator.json  the outcome of the last training with simulated users
RUN/policy_from_simulator.png   its course, and what the reward cost
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
from flax import nnx

from jaxrec.config import ModelConfig, TrainConfig, from_json
from jaxrec.data.content import item_content
from jaxrec.data.prepared import PreparedData
from jaxrec.data.store import holds_shards, read_prepared, summary_file
from jaxrec.data.trend import DecayedCounts
from jaxrec.errors import DataError
from jaxrec.files import read_json, sha256
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.neighbours import Neighbours
from jaxrec.models.reranker import Reranker, RerankerTables, RerankerWeights, Scales
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.rl.checkpoint import models_digest
from jaxrec.training.content_head import ContentHead
from jaxrec.training.loop import load_trained
from jaxrec.training.mix import Mix
from jaxrec.training.new_items import new_items, place_rows, shift_logits

SCHEMA_VERSION = 6
DATA_FOLDER = "data"
RUN_FILE = "run.json"
HYBRID_FILE = "hybrid.json"
NEIGHBOURS_FILE = "cooccurrence.npz"
NEIGHBOURS_PARTIAL_FOLDER = "cooccurrence.partial"
CONTENT_HEAD_FILE = "content_head.npz"
EVALUATION_FILE = "evaluation.json"
MLFLOW_FILE = "mlflow.json"
LSTM_FOLDER = "lstm"
CONTENT_FOLDER = "content"
POLICY_FOLDER = "policy"
SIMULATOR_PARTIAL_FOLDER = "policy.simulator.partial"
PLOT_FILE = "training.png"
POLICY_FILE = "policy.json"
POLICY_VARIABLES_FILE = "policy.npz"
POLICY_STEPS_FILE = "steps.jsonl"
POLICY_PREVIOUS_FOLDER = "policy.previous"
POLICY_PLOT_FILE = "training.png"
POLICY_SCHEMA_VERSION = 5
POLICY_WITHOUT_SHIFT = 4  # of the reranker's weights
POLICY_VERSIONS_READ = (POLICY_WITHOUT_SHIFT, POLICY_SCHEMA_VERSION)
RERANKER_FILE = "reranker.npz"
RERANKER_OUTCOME_FILE = "reranker.json"
RERANKER_PLOT_FILE = "reranker.png"
RERANKER_REFUSED_FILE = "reranker.refused.json"
RERANKER_REFUSED_PLOT_FILE = "reranker.refused.png"
RERANKER_PARTIAL_FOLDER = "reranker.partial"
SERVED_OUTCOME_FILE = "policy_from_log.json"
SIMULATED_OUTCOME_FILE = "policy_from_simulator.json"
SIMULATED_PLOT_FILE = "policy_from_simulator.png"
POLICY_FILES = (
    POLICY_FOLDER,
    POLICY_PREVIOUS_FOLDER,
    SIMULATOR_PARTIAL_FOLDER,
    SERVED_OUTCOME_FILE,
    SIMULATED_OUTCOME_FILE,
    SIMULATED_PLOT_FILE,
    RERANKER_FILE,
    RERANKER_OUTCOME_FILE,
    RERANKER_PLOT_FILE,
    RERANKER_PARTIAL_FOLDER,
    RERANKER_REFUSED_FILE,
    RERANKER_REFUSED_PLOT_FILE,
    "policy.partial",  # this one and the next one: of earlier versions
    "policy.refused",
)  # all that belongs to the models that the run has now
INITIAL_WEIGHTS = 2**32 - 1  # folded into the seed's key; training folds in the numbers of its steps


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run: its folder and what its run.json says.

    Attributes:
        folder: The run directory.
        data_folder: The prepared data, or the shards, that it was trained on.
        data_digest: SHA-256 of that data's summary file.
        item_count: Number of items of the catalogue.
        items_digest: SHA-256 of their raw ids.
        model_config: Widths of the models.
        train_config: How they were trained.
        data_version: How often the data was changed by `jaxrec train --resume --data`.
        scratch: The temporary folder that the run lies in, which goes with the last reference to it; None: it stays.
    """

    folder: Path
    data_folder: Path
    data_digest: str
    item_count: int
    items_digest: str
    model_config: ModelConfig
    train_config: TrainConfig
    data_version: int = 0
    scratch: object = dataclasses.field(default=None, repr=False, compare=False)

    def read_data(self) -> PreparedData:
        """The prepared data that the run was trained on, shards as one (`jaxrec.data.store.read_prepared`).

        Raises DataError where it is gone or was prepared anew.
        """
        self.require_data()
        return read_prepared(self.data_folder)

    def require_data(self) -> None:
        """Raises DataError where the data that the run was trained on is gone or was prepared anew."""
        summary = summary_file(self.data_folder)
        if not summary.is_file():
            raise DataError(f"{summary} is not there; {self.folder} was trained on that data: put it back")
        if sha256(summary) != self.data_digest:
            extend = f"`jaxrec train --out {self.folder} --resume --data {self.data_folder}`"
            appended = "" if holds_shards(self.data_folder) else f", or go on with what was appended: {extend}"
            raise DataError(
                f"{self.data_folder} was prepared anew since {self.folder} was trained on it; train again{appended}"
            )

    def recommend(self, histories: pd.DataFrame | Sequence[int] | Sequence[str], k: int = 10) -> pd.DataFrame:
        """The best `k` items for each history, by the policy in use: what a server of the exported run answers.

        Args:
            histories: Events of one or more users as columns user_id, item_id and, if known, rating (NaN: none) and
                timestamp (seconds); or the item ids of one history, the last event last. Without timestamps the rows
                are in order, and their events the median gap of the training events apart.
            k: Number of items.

        Returns:
            One row per recommended item: user_id, rank (from 1), item_id, title, score (a logit; training events of
            the item for a user without a known item). Items of the history are left out unless the run was trained to
            repeat (`TrainConfig.seen`), and unknown ones ignored.

        Raises:
            DataError: A column is missing or does not fit the run's data, or the run cannot be read.
        """
        from jaxrec.runs.recommend import recommend

        return recommend(self, histories, k)

    @functools.cached_property
    def supervised(self) -> tuple[PreparedData, Hybrid]:
        """The data and the models without a policy; read once."""
        data = self.read_data()
        return data, load_supervised(self, data)

    @functools.cached_property
    def counts(self) -> DecayedCounts:
        """Of all events of the data; made once, since that sorts them."""
        return DecayedCounts.of(self.supervised[0])


def open_run(run: Run | Path | str) -> Run:
    """Reads the run.json of a run directory, anew if an open run is given.

    Raises DataError where there is none, or of another schema version.
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    content = read_json(folder / RUN_FILE, "expected a folder written by `jaxrec train`")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(f"{folder / RUN_FILE}: schema version {version}, expected {SCHEMA_VERSION}; train again")
    return Run(
        folder,
        Path(content["data"]),
        content["data_sha256"],
        content["items"],
        content["items_sha256"],
        from_json(ModelConfig, content["model"]),
        from_json(TrainConfig, content["train"]),
        content["data_version"],
        run.scratch if isinstance(run, Run) else None,
    )


def new_models(
    data: PreparedData, config: ModelConfig, seed: int, item_embedding: np.ndarray | None = None
) -> tuple[TimeRatingAwareLSTM, TimeRatingAwareContentModel]:
    """Both models with fresh weights that follow from the seed, and item embeddings [items + 1, embedding] if given."""
    items = len(data.catalog)
    lstm_key, content_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), INITIAL_WEIGHTS))
    lstm = TimeRatingAwareLSTM(items, config, rngs=nnx.Rngs(lstm_key), item_embedding=item_embedding)
    content = TimeRatingAwareContentModel(
        items, item_content(data).model_matrix(), config, rngs=nnx.Rngs(content_key), item_embedding=item_embedding
    )
    return lstm, content


def read_neighbours(run: Run) -> Neighbours:
    """The neighbours that the run keeps. Raises DataError."""
    return Neighbours(*_read_cooccurrence(run, "item", "weight"))


def read_initial_embedding(run: Run) -> np.ndarray | None:
    """What the run's item vectors start from [items + 1, embedding]; None: random vectors. Raises DataError."""
    (start,) = _read_cooccurrence(run, "start")
    return start if start.size else None


def _read_cooccurrence(run: Run, *names: str) -> list[np.ndarray]:
    path = run.folder / NEIGHBOURS_FILE
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); train again") from error


def read_content_heads(run: Run, names: Sequence[str]) -> tuple[ContentHead, ContentHead]:
    """The heads of the LSTM and of the content model.

    Args:
        run: With its content_head.npz.
        names: The features of the run's data now (`ItemContent.names`).

    Returns:
        Both heads.

    Raises:
        DataError: They cannot be read, or were trained with other features.
    """
    path = run.folder / CONTENT_HEAD_FILE
    try:
        with np.load(path, allow_pickle=False) as arrays:
            of_lstm, of_content = (
                ContentHead(arrays[f"{name}_kernel"], arrays[f"{name}_offset"]) for name in ("lstm", "content")
            )
            trained = arrays["names"].tolist()
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); train again") from error
    now_named = np.array(names).tolist()  # as the file holds them: NumPy drops U+0000 from the end of a text
    if trained != now_named:
        at = next(at for at, pair in enumerate(itertools.zip_longest(trained, now_named)) if pair[0] != pair[1])
        was, now = (repr(each[at]) if at < len(each) else "none" for each in (trained, now_named))
        raise DataError(
            f"{path}: trained with {len(trained)} features, the data has {len(names)}; feature {at + 1} was {was} and "
            f"is {now}; train again"
        )
    return of_lstm, of_content


def place_new_items(
    run: Run, data: PreparedData, lstm: TimeRatingAwareLSTM, content: TimeRatingAwareContentModel
) -> np.ndarray | None:
    """Gives the items without training events the rows of the run's heads in both models; [items + 1] bool: which.

    None where there are no such items, or no heads since nothing is known of any item; then nothing changes.
    """
    new = new_items(data)
    if new is None or not (run.folder / CONTENT_HEAD_FILE).is_file():
        return None
    features = item_content(data)
    for model, head in zip((lstm, content), read_content_heads(run, features.names), strict=True):
        place_rows(model, new, np.asarray(head.rows(features.matrix)))
    return new


def load_supervised(run: Run, data: PreparedData, reranker: bool = True) -> Hybrid:
    """The mix of the run's two trained models and its co-occurrence, without a policy.

    Args:
        run: That was trained.
        data: That it was trained on.
        reranker: Whether its reranker, if it uses one, is on top of the mix.
    """
    mix = read_json(run.folder / HYBRID_FILE, "finish the training: `jaxrec train DATA --out RUN --resume`")
    ranked, _ = mix.pop("new_items"), mix.pop("hidden_items")
    lstm, content = new_models(data, run.model_config, run.train_config.seed)
    lstm = load_trained(lstm, run.train_config, run.folder / LSTM_FOLDER).model
    content = load_trained(content, run.train_config, run.folder / CONTENT_FOLDER).model
    new = place_new_items(run, data, lstm, content) if ranked else None
    hybrid = Mix(**mix).hybrid(lstm, content, CoOccurrence(read_neighbours(run)), new)
    if new is not None:
        shift_logits(hybrid, new, ranked["shift"])
    learned = read_reranker(run, hybrid) if reranker else None
    return hybrid if learned is None or not learned.used else hybrid.with_reranker(learned.policy)


class LearnedReranker(NamedTuple):
    """What `jaxrec rl logged` learned: whether the `policy` is used, and the one that only imitates, `stacked`."""

    used: bool
    policy: Reranker
    stacked: Reranker


def read_reranker(run: Run, supervised: Hybrid) -> LearnedReranker | None:
    """What `jaxrec rl logged` learned for a run.

    Args:
        run: That was trained.
        supervised: Its mix.

    Returns:
        Both rerankers; None before the command ran.

    Raises:
        DataError: The file is damaged, or was learned on top of other models.
    """
    path, again = run.folder / RERANKER_FILE, f"run `jaxrec rl logged {run.folder}` again"
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tables = RerankerTables(*(arrays[name] for name in RerankerTables._fields))
            scales = Scales(*(arrays[name] for name in Scales._fields))
            weights, stacked = (
                RerankerWeights(*(arrays[f"{prefix}{name}"] for name in RerankerWeights._fields))
                for prefix in ("", "stacked_")
            )
            models, used = str(arrays["models"]), bool(arrays["used"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); {again}") from error
    if models != models_digest(supervised):
        raise DataError(f"{path}: was learned on top of other models than the run has now; {again}")
    return LearnedReranker(used, Reranker(tables, scales, weights), Reranker(tables, scales, stacked))

"""The run directory: every file that `jaxrec train`, `jaxrec rl` and `jaxrec evaluate` write, and how it is read.

RUN/run.json                    where the data is, and the configurations
RUN/lstm/                       checkpoints and logs of TimeRatingAwareLSTM (`jaxrec.training.log`)
RUN/content/                    the same of TimeRatingAwareContentModel
RUN/training.png                loss and validation figures by epoch
RUN/cooccurrence.npz            the neighbours of each item, and the item vectors that training started from
RUN/hybrid.json                 the weights of the mix, with the validation figures that chose them
RUN/evaluation.json             written by `jaxrec evaluate`; goes into the manifest of the exported model
RUN/policy/                     the policy that `jaxrec rl` trained last (unless it was refused):
    policy.json                 whether the policy is used and why, the figures, the configuration, its models' digest
    policy.npz                  the variables of PolicyHead, after the last update
    steps.jsonl                 one record per update; of a policy from simulated users, one per 10 updates
    log.jsonl                   one record per evaluation; empty for a policy from a server's log or simulated users
    training.png                both, as a plot
RUN/policy.previous/            the policy that was in use before, where there was one
RUN/policy.refused/             a policy that was trained and refused while another one stays in use
RUN/policy.partial/             where an interrupted training on the run's own log stands
RUN/policy.simulator.partial/   where an interrupted training with simulated users stands
RUN/policy_from_log.json        the outcome of the last training on a server's log
RUN/policy_from_simulator.json  the outcome of the last training with simulated users
"""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
from flax import nnx

from jaxrec.config import ModelConfig, TrainConfig, from_json
from jaxrec.data.prepared import PreparedData
from jaxrec.data.store import SUMMARY_FILE, read_prepared
from jaxrec.errors import DataError
from jaxrec.files import read_json, sha256
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.neighbours import Neighbours
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.training.loop import load_trained

SCHEMA_VERSION = 3
RUN_FILE = "run.json"
HYBRID_FILE = "hybrid.json"
NEIGHBOURS_FILE = "cooccurrence.npz"
EVALUATION_FILE = "evaluation.json"
LSTM_FOLDER = "lstm"
CONTENT_FOLDER = "content"
POLICY_FOLDER = "policy"
POLICY_PARTIAL_FOLDER = "policy.partial"
SIMULATOR_PARTIAL_FOLDER = "policy.simulator.partial"
PLOT_FILE = "training.png"
POLICY_FILE = "policy.json"
POLICY_VARIABLES_FILE = "policy.npz"
POLICY_STEPS_FILE = "steps.jsonl"
POLICY_LOG_FILE = "log.jsonl"
POLICY_PREVIOUS_FOLDER = "policy.previous"
POLICY_REFUSED_FOLDER = "policy.refused"
POLICY_PLOT_FILE = "training.png"
POLICY_SCHEMA_VERSION = 3
SERVED_OUTCOME_FILE = "policy_from_log.json"
SIMULATED_OUTCOME_FILE = "policy_from_simulator.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory and what its run.json says. `data_digest` is the SHA-256 of the data's summary file,
    `item_count` and `items_digest` say what its catalogue began with, `data_version` how often the data was changed."""

    folder: Path
    data_folder: Path
    data_digest: str
    item_count: int
    items_digest: str
    model_config: ModelConfig
    train_config: TrainConfig
    data_version: int = 0

    def read_data(self) -> PreparedData:
        """The prepared data that the run was trained on. Raises DataError where it is gone or was prepared anew."""
        data = read_prepared(self.data_folder)
        if sha256(self.data_folder / SUMMARY_FILE) != self.data_digest:
            raise DataError(
                f"{self.data_folder} was prepared anew since {self.folder} was trained on it; train again, or go on "
                f"with what was appended: `jaxrec train --out {self.folder} --resume --data {self.data_folder}`"
            )
        return data


def open_run(folder: Path) -> Run:
    """Reads run.json. Raises DataError where there is none, or of another schema version."""
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
    )


def new_models(
    data: PreparedData, config: ModelConfig, seed: int, item_embedding: np.ndarray | None = None
) -> tuple[TimeRatingAwareLSTM, TimeRatingAwareContentModel]:
    """Both models with fresh weights that follow from the seed, and item embeddings [items + 1, embedding] if given."""
    items = len(data.catalog)
    lstm = TimeRatingAwareLSTM(items, config, rngs=nnx.Rngs(2 * seed), item_embedding=item_embedding)
    content = TimeRatingAwareContentModel(
        items, data.catalog.genre_matrix(), config, rngs=nnx.Rngs(2 * seed + 1), item_embedding=item_embedding
    )
    return lstm, content


def read_cooccurrence(run: Run) -> tuple[Neighbours, np.ndarray | None]:
    path = run.folder / NEIGHBOURS_FILE
    try:
        with np.load(path, allow_pickle=False) as arrays:
            start = arrays["start"]
            return Neighbours(arrays["item"], arrays["weight"]), start if start.size else None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read ({error}); train again") from error


def load_supervised(run: Run, data: PreparedData) -> Hybrid:
    """The mix of the run's two trained models and its co-occurrence, without a policy."""
    mix = read_json(run.folder / HYBRID_FILE, "finish the training: `jaxrec train DATA --out RUN --resume`")
    lstm, content = new_models(data, run.model_config, run.train_config.seed)
    return Hybrid(
        load_trained(lstm, run.train_config, run.folder / LSTM_FOLDER).model,
        load_trained(content, run.train_config, run.folder / CONTENT_FOLDER).model,
        CoOccurrence(read_cooccurrence(run)[0]),
        mix["weight"],
        mix["cooccurrence_weight"],
    )

"""SASRec of RecTools on a log that bench/public.py wrote; runs in an environment of its own.

    python sasrec.py LOG ANSWER [EPOCHS]

LOG is CSV with the columns user, item and part (train, validation, test), the events of each user in their order.
ANSWER becomes JSON: `items`, the best TOP for each user after training and validation events, `epochs`, `seconds`,
`version`.
The model is trained on the training events until its loss on the validation events has not fallen for PATIENCE epochs;
the weights of its best epoch are kept.
"""

import importlib.metadata
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

TOP, EPOCHS, PATIENCE, WIDTH, LENGTH = 50, 100, 3, 256, 50


def last_of_each_user(interactions: pd.DataFrame) -> np.ndarray:
    """[interactions] bool."""
    later = interactions.groupby(Columns.User, sort=False)[Columns.Datetime].transform("max")
    return (interactions[Columns.Datetime] == later).to_numpy()


def main(log: Path, answer: Path, epochs: int) -> None:
    """Trains, recommends and writes."""
    pytorch_lightning.seed_everything(0)
    events = pd.read_csv(log)
    known = events[events["part"] != "test"]
    interactions = pd.DataFrame(
        {
            Columns.User: known["user"],
            Columns.Item: known["item"],
            Columns.Weight: 1,
            Columns.Datetime: pd.Timestamp(2020, 1, 1) + pd.to_timedelta(np.arange(len(known)), unit="s"),
        }
    )
    dataset = Dataset.construct(interactions)
    with tempfile.TemporaryDirectory() as folder:

        def trainer() -> pytorch_lightning.Trainer:
            best = ModelCheckpoint(folder, monitor="val_loss", mode="min", save_weights_only=True)
            return pytorch_lightning.Trainer(
                accelerator="cpu",
                max_epochs=epochs,
                callbacks=[best, EarlyStopping("val_loss", mode="min", patience=PATIENCE)],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )

        model = SASRecModel(
            n_factors=WIDTH,
            n_blocks=2,
            n_heads=4,
            dropout_rate=0.2,
            session_max_len=LENGTH,
            loss="softmax",
            lr=1e-3,
            batch_size=128,
            epochs=epochs,
            get_val_mask_func=last_of_each_user,
            get_trainer_func=trainer,
        )
        started = time.perf_counter()
        model.fit(dataset)
        seconds = time.perf_counter() - started
        used = model.fit_trainer  # a copy of what `trainer` returned
        model.load_weights_from_checkpoint(used.checkpoint_callback.best_model_path)
    users = known["user"].unique()
    found = model.recommend(users=users, dataset=dataset, k=TOP, filter_viewed=True)
    lists = found.sort_values(Columns.Rank).groupby(Columns.User)[Columns.Item].agg(list)
    result = {
        "items": {str(user): items for user, items in lists.items()},
        "epochs": used.current_epoch,
        "seconds": seconds,
        "version": importlib.metadata.version("rectools"),
    }
    answer.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else EPOCHS)

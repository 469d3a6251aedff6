"""From your own CSV to recommendations: prepare, train, evaluate, recommend, export.

    python examples/own_csv.py ratings.csv work

The CSV has the columns user_id, item_id, rating (may be empty) and timestamp (seconds).
"""

import sys
from pathlib import Path

import pandas as pd

import jaxrec


def main(
    ratings: str,
    out: str,
    prepare_config: jaxrec.PrepareConfig = jaxrec.PrepareConfig(min_user_ratings=5),
    model_config: jaxrec.ModelConfig = jaxrec.ModelConfig(),
    train_config: jaxrec.TrainConfig = jaxrec.TrainConfig(),
) -> None:
    """Keeps everything in the folder `out`."""
    folder = Path(out)
    interactions = pd.read_csv(ratings)

    # Every row is checked, rare users and items are dropped, and each user's last two events are held out.
    data = jaxrec.prepare(interactions, None, prepare_config)
    print(data.summary())

    # Both models, and their mix, which is tuned on each user's last but one event.
    run = jaxrec.train(data, folder / "run", model_config, train_config)

    # Each user's last event is ranked among the whole catalogue, beside the baselines.
    print(jaxrec.evaluate(run))

    # For a user of the log, and for a new one with three items.
    user = interactions["user_id"].iloc[0]
    print(run.recommend(interactions[interactions["user_id"] == user], k=5))
    print(run.recommend(interactions["item_id"].unique()[:3].tolist(), k=5))

    # The graphs are compared with JAX before the folder appears.
    manifest = jaxrec.export(run, folder / "model")
    print(f"model {manifest['model_version']}; serve it with: python -m serve run {folder / 'model'}")


if __name__ == "__main__":
    main(*sys.argv[1:])

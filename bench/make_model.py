"""Exports a model with random weights, for benchmarks of serving: latency does not depend on what was learned.

    python bench/make_model.py --items 10000 --out runs/bench-model

With an index it does, a little: how many candidates it takes depends on how the item vectors lie. `--clustered` places
them as training does in kind: around centres, one for about 100 items, few of them large, along axes that matter less
and less, with biases for what is popular. The LSTMs stay random, so queries don't favour a centre as real ones do,
which makes it harder for the index.
"""

from pathlib import Path

import click
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx

from jaxrec.config import ModelConfig, PrepareConfig, RatingScale
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import GENRES, ITEM, RATING, TIME, TITLE, USER
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.hybrid import Hybrid, MixWeights
from jaxrec.models.linear import RANK
from jaxrec.models.neighbours import NEIGHBOURS, Neighbours
from jaxrec.models.reranker import CONTEXT, FEATURES, Reranker, RerankerTables, RerankerWeights, Scales
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.onnx.model_directory import export_model
from jaxrec.rl.reward_tables import genre_directions


def random_neighbours(items: int, rng: np.random.Generator) -> Neighbours:
    """As many neighbours as training would find for items that are met often."""
    shape = (items + 1, min(NEIGHBOURS, items))
    item, weight = rng.integers(1, items + 1, shape, dtype=np.int32), rng.random(shape, dtype=np.float32)
    item[0], weight[0] = 0, 0.0
    return Neighbours(item, -np.sort(-weight, axis=1))


def clustered_vectors(items: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """[items + 1, width] float32 around centres whose sizes follow a power law."""
    axes = np.linspace(1, 0.2, width)
    centres = rng.normal(size=(max(20, items // 100), width)) * axes
    shares = np.arange(1, len(centres) + 1) ** -0.7
    of_item = rng.choice(len(centres), items + 1, p=shares / shares.sum())
    return (centres[of_item] + 0.7 * rng.normal(size=(items + 1, width)) * axes).astype(np.float32)


def random_reranker(data: PreparedData, hybrid: Hybrid, rng: np.random.Generator) -> Reranker:
    """With tables as wide as training makes them."""
    items = len(data.catalog)
    code = rng.normal(size=(2, items + 1, RANK)).astype(np.float32) / np.sqrt(RANK)
    biases = np.stack([model.item_bias_table[...] for model in (hybrid.lstm, hybrid.content)], axis=1)
    genres = genre_directions(data.catalog.genre_matrix())
    tables = RerankerTables(*code, biases, genres, rng.random(items + 1, np.float32))
    scales = Scales(
        rng.uniform(0.5, 2, len(FEATURES)), rng.normal(size=len(CONTEXT)), rng.uniform(0.5, 2, len(CONTEXT))
    )
    weights = RerankerWeights(rng.normal(size=len(FEATURES)), rng.normal(size=(len(CONTEXT), len(FEATURES))))
    return Reranker(tables, scales, weights)


@click.command(context_settings={"show_default": True})
@click.option("--items", type=click.IntRange(2), default=10_000, help="Size of the catalogue.")
@click.option("--hidden", type=click.IntRange(1), default=ModelConfig.hidden)
@click.option("--clustered", is_flag=True, help="Item vectors around centres.")
@click.option("--index/--no-index", default=None, help="An index of the items; otherwise as `jaxrec export` has it.")
@click.option("--reranker", is_flag=True, help="With a reranker of the best 100 items.")
@click.option("--seed", type=int, default=0)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(items: int, hidden: int, clustered: bool, index: bool | None, reranker: bool, seed: int, out: Path) -> None:
    """Writes a model directory with ITEMS movies, 19 genres and random weights."""
    rng = np.random.default_rng(seed)
    ids = np.arange(1, items + 1)
    genres = ["|".join(f"Genre {g}" for g in rng.choice(19, 3, replace=False)) for _ in ids]
    movies = pd.DataFrame({ITEM: ids, TITLE: [f"Movie {i}" for i in ids], GENRES: genres})
    log = pd.DataFrame({USER: 1 + ids % 100, ITEM: rng.permutation(ids), RATING: np.float32(4.0), TIME: 10**9 + ids})
    config = PrepareConfig(min_user_ratings=1, min_movie_ratings=1, rating_scale=RatingScale(0.5, 5.0))
    data = prepare(log, movies, config)
    model, rngs = ModelConfig(hidden=hidden), nnx.Rngs(seed)
    start = clustered_vectors(items, model.embedding, rng) if clustered else None
    lstm = TimeRatingAwareLSTM(items, model, rngs=rngs, item_embedding=start)
    genre_matrix = data.catalog.genre_matrix()
    content = TimeRatingAwareContentModel(items, genre_matrix, model, rngs=rngs, item_embedding=start)
    if clustered:
        lstm.item_bias_table[...] = jnp.asarray(rng.gamma(1.0, 0.5, items + 1), jnp.float32)
    hybrid = Hybrid(
        lstm,
        content,
        CoOccurrence(random_neighbours(items, rng)),
        MixWeights(0.5, 0.5, 1.0 if clustered else 8.0),
    )
    if reranker:
        hybrid = hybrid.with_reranker(random_reranker(data, hybrid, rng))
    manifest = export_model(
        hybrid,
        data,
        out,
        training={"note": "random weights"},
        metrics={},
        licence="Random data.\n",
        index=index,
    )
    click.echo(f"{out}: model {manifest['model_version']}")


if __name__ == "__main__":
    main()

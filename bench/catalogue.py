"""Measures how soon a change of the catalogue is on another server of the store, for bench/catalogue.md.

    python -m bench.catalogue --work FOLDER

Two servers share a store and a model directory of a million items with random weights. UpsertItems changes the title of
one item after another on the first server, without a pause, for 20 seconds. Another client asks the second server with
an allow-list for the item of the newest change that was acknowledged, until the answer has its title or a later one,
and then for the next one. A delay is the time from the acknowledgement of UpsertItems to the answer of Recommend that
has the new title, with what that Recommend takes. The item vectors have 16 numbers, so that the model takes little of
it; the catalogue does not depend on them.
"""

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np
import pandas as pd
from flax import nnx

from bench.make_model import random_neighbours
from bench.publish import Page, begin, less, paragraph, publish_option, write_arrays
from jaxrec.config import ModelConfig, PrepareConfig, RatingScale
from jaxrec.data.prepare import prepare
from jaxrec.data.schema import GENRES, ITEM, RATING, TIME, TITLE, USER
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.hybrid import Hybrid, MixWeights
from jaxrec.models.neighbours import Neighbours
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.onnx.model_directory import export_model
from serve.client import Connection, Event, Item, ItemFilter, RecommenderClient
from tests.serve.process import StartError, running_server
from tests.serve.stores.databases import postgres_server, redis_server

ITEMS, SECONDS, CHANGED = 1_000_000, 20, 1_000
STORES = ("SQLite", "Redis", "PostgreSQL")
NEEDED = ("SQLite", "PostgreSQL")
NEIGHBOURS = 4
START_S = 60.0
"""A store whose server is not ready then is not measured."""
GOAL_S = 2.0
SEEN_WITHIN_S = 60.0
"""A change that is not there then is a failure."""


@click.command(context_settings={"show_default": True})
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Model and figures stay here.")
@click.option("--items", type=click.IntRange(2 * CHANGED), default=ITEMS, help="Size of the catalogue.")
@click.option("--seconds", type=click.IntRange(1), default=SECONDS, help="How long the catalogue is changed.")
@click.option("--store", "stores", type=click.Choice(STORES), multiple=True, default=NEEDED)
@publish_option
def main(work: Path, items: int, seconds: int, stores: tuple[str, ...], publish: bool) -> None:
    """Measures what is not there yet, then writes the table."""
    needed = less(items=(items, ITEMS), seconds=(seconds, SECONDS), stores=(stores, NEEDED))
    page = Page("catalogue", "Changes of the catalogue", publish, work, needed)
    folder, done = work / f"{items}", dict[str, Path]()
    folder.mkdir(parents=True, exist_ok=True)
    begun = begin(folder / "begun.json", folder / "model")
    if not (folder / "model").is_dir():
        make_model(items, folder / "model")
    for name in stores:
        path = folder / f"{name}-{seconds}.npz"
        if not path.is_file():
            try:
                write_arrays(path, measure(folder / "model", name, seconds, folder))
            except StartError:
                continue
        done[name] = path
    what = paragraph(__doc__)
    lines = [f"{what}\n", f"{items:,} items; the goal is {GOAL_S:g} s.\n"]
    lines += ["| store | changes in that time | delays | median s | 95 % s | worst s |", "|---|---|---|---|---|---|"]
    for name in stores:
        if name not in done:
            lines.append(f"| {name} | not measured: a server was not ready within {START_S:g} s | | | | |")
            continue
        found = np.load(done[name])
        delays = found["delays"]
        figures = (np.median(delays), np.quantile(delays, 0.95), delays.max())
        cells = [name, f"{int(found['changes']):,}", f"{len(delays)}", *(f"{one:.2f}" for one in figures)]
        lines.append("| " + " | ".join(cells) + " |")
    page.write(lines, [begun, *done.values()])


def make_model(items: int, out: Path) -> None:
    """A model directory with that many items."""
    rng, rngs, ids = np.random.default_rng(0), nnx.Rngs(0), np.arange(1, items + 1)
    genres = np.array([f"Genre {at}" for at in range(19)])
    of_items = rng.integers(0, len(genres), (items, 3))
    movies = pd.DataFrame(
        {
            ITEM: ids,
            TITLE: [f"Movie {at}" for at in ids.tolist()],
            GENRES: ["|".join(sorted(set(row))) for row in genres[of_items].tolist()],
        }
    )
    log = pd.DataFrame({USER: 1 + ids % 1_000, ITEM: rng.permutation(ids), RATING: np.float32(4), TIME: 10**9 + ids})
    data = prepare(log, movies, PrepareConfig(1, 1, rating_scale=RatingScale(0.5, 5.0)))
    config = ModelConfig(embedding=8, hidden=8, rating_width=4, time_width=4)
    neighbours = random_neighbours(items, rng)
    hybrid = Hybrid(
        TimeRatingAwareLSTM(items, config, rngs=rngs),
        TimeRatingAwareContentModel(items, data.catalog.genre_matrix(), config, rngs=rngs),
        CoOccurrence(Neighbours(neighbours.item[:, :NEIGHBOURS], neighbours.weight[:, :NEIGHBOURS])),
        MixWeights(0.5, 0.5, 1.0),
    )
    export_model(hybrid, data, out, training={}, metrics={}, licence="Random data.", index=False)


def measure(model: Path, name: str, seconds: int, folder: Path) -> dict[str, np.ndarray]:
    """`delays` in seconds, and how many `changes` there were."""
    with ExitStack() as stack:
        store: str | Path = folder / f"{name}-{time.time_ns()}.sqlite"
        if name != "SQLite":
            server = stack.enter_context(postgres_server() if name == "PostgreSQL" else redis_server())
            store = server.location
        one, other = (
            stack.enter_context(RecommenderClient(Connection(stack.enter_context(running).address, timeout_s=60.0)))
            for running in [running_server(model, store, provider="cpu", timeout_s=START_S) for _ in range(2)]
        )
        return delays(one, other, seconds)


def delays(one: RecommenderClient, other: RecommenderClient, seconds: int) -> dict[str, np.ndarray]:
    """As `measure`, of two servers that are ready."""
    acknowledged: list[float] = []
    failures: list[Exception] = []
    end = time.monotonic() + seconds

    def change() -> None:
        try:
            change_on()
        except Exception as error:
            failures.append(error)

    def change_on() -> None:
        while time.monotonic() < end:
            number = len(acknowledged)
            one.upsert_items([Item(item_id=str(1 + number % CHANGED), title=f"Change {number}", tags=["Genre 1"])])
            acknowledged.append(time.monotonic())

    def shown(number: int) -> int:
        """The newest change of the item of a change that the other server shows; -1: none."""
        history = [Event(item_id=str(CHANGED + 1), timestamp=10**9)]
        allowed = ItemFilter(allow_item_ids=[str(1 + number % CHANGED)])
        (item,) = other.recommend(history=history, k=1, filter=allowed).recommendations
        return int(item.title.removeprefix("Change ")) if item.title.startswith("Change ") else -1

    shown(0)
    writer = threading.Thread(target=change)
    writer.start()
    found = []
    while time.monotonic() < end and not failures:
        if not acknowledged:
            time.sleep(0.01)
            continue
        number = len(acknowledged) - 1
        late = acknowledged[number] + SEEN_WITHIN_S
        while shown(number) < number:
            if time.monotonic() > late:
                raise TimeoutError(f"change {number} is not on the other server after {SEEN_WITHIN_S:g} s")
        found.append(time.monotonic() - acknowledged[number])
    writer.join()
    if failures:
        raise failures[0]
    return {"delays": np.array(found), "changes": np.array(len(acknowledged))}


if __name__ == "__main__":
    main()

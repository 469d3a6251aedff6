"""Closes the loop: serve, log, learn, gate, reload, with simulated users, for bench/rl_loop.md.

    python -m bench.rl_loop --work FOLDER RATINGS

Half of the log's users train a run (`jaxrec train`, defaults). The other half, whom it never sees, are the users of the
simulator, which is fitted on them and is of another family of models (`jaxrec.rl.simulated.users`). One loop begins
with this run and trains the network; the other one begins with the run after `jaxrec rl logged` (defaults) and trains
the weights of its reranker, which the run uses here even if the gate of `rl logged` refused it: half of the users may
be too few to show its gain.

A round: every simulated user comes with 20 successive events of its own (others in each round, so that histories do
not grow over the rounds), asks the server over gRPC for slates, chooses an item or none, rates it, and records that
with the recommendation's id. The server (`python -m serve run MODELS --explore TEMPERATURE`) logs its slates. Then
`jaxrec rl served RUN --log EVENTS` learns from the server's store and its gate decides. If it accepts the new policy,
the run is exported as the next version, and the server loads it by the admin service. The control has the same users
and seeds, and never learns. The reward is half for taking and half for the rating (0..1) of what was taken.
"""

import dataclasses
import json
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import jaxrec
from bench.intervals import student
from bench.publish import Page, begin, less, publish_option, read_figures, write_figures
from jaxrec.data.catalog import Catalog
from jaxrec.data.histories import Histories
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, RATING, TIME, USER
from jaxrec.data.store import read_prepared, write_prepared
from jaxrec.files import new_file
from jaxrec.rl.config import LoggedConfig, RewardWeights, ServedConfig
from jaxrec.rl.simulated.fit import SimulatorFit, fit_simulator, profiles, simulator_histories
from jaxrec.rl.simulated.users import SimulatorParams, choice_terms, start_user, step
from jaxrec.runs.directory import RERANKER_FILE, RERANKER_OUTCOME_FILE, RERANKER_PARTIAL_FOLDER
from jaxrec.runs.policy import load_run
from jaxrec.runs.rl_served import run_served
from serve.client import Connection, RecommenderClient, UserEvent, recommend_request
from serve.pb.model_admin_pb2 import LoadModelRequest
from serve.pb.model_admin_pb2_grpc import ModelAdminStub
from tests.serve.process import running_server

SEEDS = 5  # of the page
RUNS = ("reranker", "network")  # what the loop trains
BATCH, RECORDED = 128, 1000  # recommendations and events per call
HOUR, DAY = 3600, 86_400
LOGGED_WITHIN_S = 30.0
LEARNING = ServedConfig(
    updates=200,
    entropy_floor=0.0,
    coverage_floor=0.0,
    rewards=RewardWeights(hit=1.0, genre=0.0, rating=0.0),
)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """`requests` of each user in a round, for slates of `slate` items; `temperature` of the exploration; `events` that
    users start with. `learning`: of `jaxrec rl served`."""

    rounds: int = 5
    requests: int = 10
    slate: int = 5
    temperature: float = 0.5
    events: int = 20
    learning: ServedConfig = LEARNING


class Users(NamedTuple):
    """The simulated users and the catalogue that they choose from; `histories` are those they were fitted on."""

    params: SimulatorParams
    histories: Histories
    catalog: Catalog


class Round(NamedTuple):
    """Means over a round's requests by user [users]: `reward`, and its terms; `decision`: what the gate said after
    it, empty in the control; `version` that served; `coverage`: the share of the catalogue that was shown."""

    reward: np.ndarray
    taken: np.ndarray
    rating: np.ndarray
    coverage: float
    version: str
    decision: str
    used: bool


def loop(run: Path, model: Path, users: Users, config: LoopConfig, seed: int, work: Path, learns: bool) -> list[Round]:
    """The rounds, each with its serving and, where it `learns`, what it learned after; and a last serving.

    `run` is changed: its policy is replaced where the gate agrees. `model` is the run as it was exported at first.
    """
    models, store = work / "models", work / "events.sqlite"
    work.mkdir(parents=True)
    shutil.copytree(model, models / "0")
    options = ("--explore", str(config.temperature), "--watch", "0")
    rounds: list[Round] = []
    with (
        (work / "server.log").open("w") as log,
        running_server(models, store, options=options, stderr=log) as server,
        RecommenderClient(server.address, timeout_s=60.0) as client,
        Connection(server.address, 60.0).channel() as channel,
    ):
        for number in range(config.rounds + 1):
            started = time.perf_counter()
            version = client.get_model_info().model_version
            key = jax.random.fold_in(jax.random.key(seed), number)
            reward, terms, coverage = serve_round(client, users, config, key, f"{seed}-{number}")
            decision, used = "", False
            if learns and number < config.rounds:
                _wait_for_log(store, (number + 1) * len(reward) * config.requests)
                learning = dataclasses.replace(config.learning, seed=1000 * seed + number)
                outcome = run_served(load_run(run), store, learning)
                decision, used = outcome.reason, outcome.used
                if used:
                    jaxrec.export(run, models / str(number + 1))
                    ModelAdminStub(channel).LoadModel(LoadModelRequest(), timeout=120.0)
            rounds.append(Round(reward, terms["taken"], terms["rating"], coverage, version, decision, used))
            print(
                f"seed {seed}, {'learns' if learns else 'control'}, round {number}: reward {reward.mean():.4f}, "
                f"{time.perf_counter() - started:.0f} s; {decision}",
                flush=True,
            )
    return rounds


def serve_round(
    client: RecommenderClient, users: Users, config: LoopConfig, key: jax.Array, name: str
) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """Every simulated user asks and answers; means over the requests [users] of the reward and of its terms, and the
    share of the catalogue that was shown."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    latest = np.maximum(users.histories.lengths() - config.events, 0)
    first = rng.integers(0, latest + 1)
    params = users.params._replace(**profiles(users.histories, first, config.events))
    count = len(params.profile)
    ids = [f"{name}-{user}" for user in range(count)]
    _record_profiles(client, params, ids, users.catalog)
    state, _ = jax.vmap(lambda user: start_user(params, user))(jnp.arange(count))
    go = jax.jit(jax.vmap(step, in_axes=(None, 0, 0, 0)))
    terms_of = jax.jit(jax.vmap(choice_terms, in_axes=(None, 0)))
    index = {str(raw): number for number, raw in enumerate(users.catalog.ids.raw_ids.tolist(), start=1)}
    rewards, terms, shown = [], [], set[int]()
    for number in range(config.requests):
        # They answer at once, however long this machine takes to simulate it: the log has no delays to wait for.
        now = int(time.time())
        questions = [recommend_request(user_id=user, k=config.slate) for user in ids]
        answers = [
            answer
            for start in range(0, count, BATCH)
            for answer in client.batch_recommend(questions[start : start + BATCH])
        ]
        slates = np.array([[index[one.item_id] for one in answer.recommendations] for answer in answers], np.int32)
        shown.update(slates.ravel().tolist())
        keys = jax.random.split(jax.random.fold_in(key, number), count)
        state, observation, reward, _ = go(params, state, slates, keys)
        slot, rating = np.asarray(observation.slot), np.asarray(observation.rating[:, 0])
        _record(
            client,
            [
                UserEvent(
                    event_id=f"{ids[user]}-{number}",
                    user_id=ids[user],
                    item_id=answers[user].recommendations[slot[user]].item_id,
                    rating=float(rating[user]),
                    timestamp=now,
                    recommendation_id=answers[user].recommendation_id,
                )
                for user in np.flatnonzero(slot >= 0)
            ],
        )
        rewards.append(np.asarray(reward))
        terms.append(jax.device_get(terms_of(params, observation)))
    means = {name: np.mean([each[name] for each in terms], axis=0) for name in terms[0]}
    return np.mean(rewards, axis=0), means, len(shown) / len(users.catalog)


def _record_profiles(client: RecommenderClient, params: SimulatorParams, ids: list[str], catalog: Catalog) -> None:
    """The events that the users come with, one an hour, the last one a day ago."""
    items, ratings = np.asarray(params.profile), np.asarray(params.profile_rating)
    latest = int(time.time()) - DAY
    events = []
    for user, user_id in enumerate(ids):
        for back in np.flatnonzero(items[user])[::-1]:
            item, rating = str(catalog.ids.raw_ids[items[user, back] - 1]), ratings[user, back]
            rated = None if np.isnan(rating) else float(rating)
            event_id = f"{user_id}-before-{back}"
            when = latest - HOUR * int(back)
            events.append(UserEvent(event_id=event_id, user_id=user_id, item_id=item, rating=rated, timestamp=when))
    _record(client, events)


def _record(client: RecommenderClient, events: list[UserEvent]) -> None:
    for start in range(0, len(events), RECORDED):
        client.record_events(events[start : start + RECORDED])


def _wait_for_log(store: Path, count: int) -> None:
    """Returns when `count` recommendations are in the store; the server writes them within a second or so."""
    deadline = time.monotonic() + LOGGED_WITHIN_S
    while True:
        with sqlite3.connect(f"{store.resolve().as_uri()}?mode=ro", uri=True) as connection:
            (there,) = connection.execute("SELECT count(*) FROM shown").fetchone()
        connection.close()
        if there >= count:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{there} of {count} recommendations were logged within {LOGGED_WITHIN_S:g} s")
        time.sleep(0.05)


def halves(ratings: pd.DataFrame, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The ratings of one half of the users, drawn at random, and those of the other half."""
    users = np.random.default_rng(seed).permutation(ratings[USER].unique())
    first = ratings[USER].isin(users[: len(users) // 2])
    return ratings[first], ratings[~first]


def trained_half(work: Path, ratings: Path) -> tuple[Path, PreparedData, pd.DataFrame]:
    """WORK/run, trained on one half of the users if it is not there yet, its data, and the ratings of the others.

    WORK/begun.json says where that was begun.
    """
    begin(work / "begun.json")
    frame = pd.read_csv(ratings)
    frame.columns = [USER, ITEM, RATING, TIME]
    training, others = halves(frame)
    if not (work / "data").is_dir():
        training.set_axis(["userId", "movieId", "rating", "timestamp"], axis=1).to_csv(work / "half.csv", index=False)
        write_prepared(prepare(work / "half.csv", ratings.with_name("movies.csv")), work / "data")
    run, data = work / "run", read_prepared(work / "data")
    if not (run / "hybrid.json").is_file():
        jaxrec.train(work / "data", run, resume=(run / "run.json").is_file())
    return run, data, others


def fitted_users(interactions: pd.DataFrame, data: PreparedData, seed: int = 0) -> tuple[Users, SimulatorFit]:
    """Simulated users from interactions of people on whom `data` does not hold anything."""
    assert data.config.rating_scale is not None
    histories, _ = simulator_histories(interactions, data.catalog, data.users)
    stars = np.unique(histories.ratings[~np.isnan(histories.ratings)])
    star = float(np.diff(stars).min())
    fit = fit_simulator(histories, data.catalog.genre_matrix(), data.config.rating_scale, star, seed)
    return Users(fit.params, histories, data.catalog), fit


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Data, run and figures stay here.")
@click.option("--seeds", default=SEEDS, show_default=True)
@click.option("--rounds", default=LoopConfig.rounds, show_default=True)
@click.option("--runs", default=",".join(RUNS), show_default=True, help="What the loop trains.")
@publish_option
@click.argument("ratings", type=click.Path(exists=True, path_type=Path))
def main(work: Path, seeds: int, rounds: int, runs: str, publish: bool, ratings: Path) -> None:
    """Plays what is not there yet, then writes the tables."""
    kinds = runs.split(",")
    if unknown := set(kinds) - set(RUNS):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; expected {' or '.join(RUNS)}", param_hint="--runs")
    asked = less(seeds=(seeds, SEEDS), rounds=(rounds, LoopConfig.rounds), runs=(kinds, RUNS))
    page = Page("rl_loop", "The closed loop", publish, work, asked)
    config = LoopConfig(rounds=rounds)
    supervised, data, others = trained_half(work, ratings)
    users, fit = fitted_users(others, data)
    body, results = setting(config, fit, users, len(data.users), seeds), [work / "begun.json"]
    for kind in kinds:
        run, title = supervised, "## The run as it was trained: the loop trains the network\n"
        if kind == "reranker":
            run, reason = with_reranker(supervised, work / "run-with-reranker")
            title = f"## After `jaxrec rl logged`: the loop trains the reranker's weights\n\n`rl logged`: {reason}\n"
        played = play_seeds(work / kind, run, users, config, seeds)
        body += [f"\n{title}", *table({arm: [*map(read_figures, files)] for arm, files in played.items()}, config)]
        results += [file for files in played.values() for file in files]
    page.write(body, results)


def with_reranker(supervised: Path, run: Path, config: LoggedConfig = LoggedConfig()) -> tuple[Path, str]:
    """RUN, a copy of the supervised run after `jaxrec rl logged`, which is resumed where it stopped, and what its gate
    said. The run uses the reranker whatever the gate said."""
    if not run.is_dir():
        copy = run.with_suffix(".copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(supervised, copy)
        copy.rename(run)
    interrupted = (run / RERANKER_PARTIAL_FOLDER).is_dir()
    if interrupted or not (run / RERANKER_OUTCOME_FILE).is_file():
        jaxrec.fine_tune(run, config, resume=interrupted)
    with np.load(run / RERANKER_FILE) as arrays:
        learned = dict(arrays)
    if not learned["used"]:
        with new_file(run / RERANKER_FILE) as temporary, temporary.open("wb") as file:
            np.savez(file, **{**learned, "used": True})
    return run, json.loads((run / RERANKER_OUTCOME_FILE).read_text("utf-8"))["reason"]


def play_seeds(work: Path, run: Path, users: Users, config: LoopConfig, seeds: int) -> dict[str, list[Path]]:
    """The files of the rounds of all seeds, of the loop that learns and of its control, played where they are missing;
    they begin with `run`."""
    if not (work / "model").is_dir():
        jaxrec.export(run, work / "model")
    played: dict[str, list[Path]] = {"learns": [], "control": []}
    for seed in range(seeds):
        for name, files in played.items():
            folder = work / f"{name}-{seed}-of-{config.rounds}"
            files.append(folder.with_suffix(".json"))
            if files[-1].is_file():
                continue
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(run, folder / "run")
            learns = name == "learns"
            rounds_of = loop(folder / "run", work / "model", users, config, seed, folder / "serving", learns)
            figures = [{**one._asdict(), **{n: getattr(one, n).tolist() for n in TERMS}} for one in rounds_of]
            write_figures(files[-1], figures)
    return played


TERMS = ("reward", "taken", "rating")


def setting(config: LoopConfig, fit: SimulatorFit, users: Users, trained_on: int, seeds: int) -> list[str]:
    """What all tables have in common."""
    paragraphs = [paragraph.strip().replace("\n", " ") for paragraph in (__doc__ or "").split("\n\n")[2:]]
    params = users.params
    return [
        *(f"{paragraph}\n" for paragraph in paragraphs),
        f"{trained_on} users trained the run, {len(params.profile)} others are simulated. Held-out next items of the "
        f"simulator's own users: {fit.nats:.3f} nats per event (popularity alone {fit.popularity_nats:.3f}, all "
        f"items alike {fit.uniform_nats:.3f}), NDCG@10 {fit.ndcg_10:.3f} (popularity {fit.popularity_ndcg_10:.3f}); "
        f"held-out ratings: error {fit.rating_rmse:.3f} stars (their mean: {fit.mean_rating_rmse:.3f}). Genres of the "
        f"last three items weigh {float(params.repetition):+.2f} in the choice (below 0 would be satiation). Position "
        f"bias {float(params.position_bias):g} and salience {float(params.salience):g} are assumed.\n",
        f"{config.requests} requests of each user in a round for slates of {config.slate}, exploration at temperature "
        f"{config.temperature:g}; `jaxrec rl served` with {config.learning.updates} updates, learning rate "
        f"{config.learning.learning_rate:g}, KL target {config.learning.kl_target:g}, no floors, reward: the hit "
        f"alone. {seeds} seeds; 95 % intervals over users (Student), each the mean of its seeds.",
    ]


def table(played: dict[str, list[list[dict[str, Any]]]], config: LoopConfig) -> list[str]:
    """The rounds of all seeds; intervals are over the users, whose seeds are averaged."""
    seeds = len(played["learns"])
    lines = [
        "| round | reward, learning | reward, control | difference | taken | rating of the taken | coverage | gate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    means = {
        name: {term: np.array([[one[term] for one in of_seed] for of_seed in of_arm]) for term in TERMS}
        for name, of_arm in played.items()
    }  # [seeds, rounds, users]
    learns, control = means["learns"]["reward"].mean(axis=0), means["control"]["reward"].mean(axis=0)
    for number in range(learns.shape[0]):
        used = [of_seed[number]["used"] for of_seed in played["learns"]]
        taken, rating = (means["learns"][term].mean(axis=0)[number].mean() for term in ("taken", "rating"))
        covered = np.mean([of_seed[number]["coverage"] for of_seed in played["learns"]])
        gated = f"{sum(used)} of {seeds} passed" if number < config.rounds else ""
        rewards = (learns[number], control[number], learns[number] - control[number])
        figures = (*map(interval, rewards), f"{taken:.3f}", f"{rating / taken:.3f}", f"{covered:.3f}", gated)
        lines.append(f"| {number} | {' | '.join(figures)} |")
    gain = {name: interval(of_arm[-1] - of_arm[0]) for name, of_arm in (("learning", learns), ("control", control))}
    lines.append(f"\nLast round less round 0: {gain['learning']} learning, {gain['control']} in the control.\n")
    lines += [
        f"- seed {seed}, after round {number}: {one['decision']}"
        for seed, of_seed in enumerate(played["learns"])
        for number, one in enumerate(of_seed)
        if one["decision"]
    ]
    return lines


def interval(values: np.ndarray) -> str:
    """Mean and Student's 95 % interval of values [users]."""
    mean, half = student(values)
    return f"{mean:.4f} ({mean - half:.4f}-{mean + half:.4f})"


if __name__ == "__main__":
    main()

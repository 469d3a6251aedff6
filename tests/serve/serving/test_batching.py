"""Requests that wait go together, each gets its own answer, and none waits for company."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from serve.model.events import Event
from serve.model.ranking.engine import like_lengths
from serve.model.recommender import Answer, Query, Recommender
from serve.serving import batching
from serve.serving.batching import Batcher, Run
from serve.serving.errors import Cancelled, Expired, QueueFull
from serve.serving.states import StateCache
from serve.stores.base import EventStore, UserEvent

PATIENCE_S = 30.0


class GatedModel:
    """A model whose runs wait for a gate; `started` tells that one does."""

    def __init__(self, model: Recommender) -> None:
        self._model = model
        self.gate, self.started = threading.Event(), threading.Event()
        self.queries: list[Query] = []

    def recommend(self, queries: Sequence[Query]) -> list[Answer]:
        self.started.set()
        assert self.gate.wait(PATIENCE_S)
        self.queries.extend(queries)
        return self._model.recommend(queries)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.001)


@contextmanager
def busy(batcher: Batcher, gated: GatedModel, query: Query) -> Iterator[ThreadPoolExecutor]:
    """The model runs for somebody, and goes on when the block ends."""
    with ThreadPoolExecutor(40) as pool:
        first = pool.submit(batcher.recommend, query)
        try:
            assert gated.started.wait(PATIENCE_S)
            yield pool
        finally:
            gated.gate.set()
        first.result(PATIENCE_S)


def queries_of(model: Recommender, count: int) -> list[Query]:
    """Histories of different lengths and items, all different."""
    rng = np.random.default_rng(0)
    return [
        Query(
            [Event(item, 4.0, 86_400 * at) for at, item in enumerate(rng.choice(model.catalog.item_ids[1:], n))],
            k=int(rng.integers(1, 20)),
        )
        for n in rng.integers(1, 60, count)
    ]


def assert_equal(found: Answer, expected: Answer) -> None:
    np.testing.assert_array_equal(found.items, expected.items)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


def test_a_lone_request_runs_alone_and_at_once(model: Recommender) -> None:
    runs: list[Run] = []
    batcher = Batcher(model.recommend, on_run=runs.append)
    (query,) = queries_of(model, 1)
    caller = threading.get_ident()
    ran_in = []
    alone = Batcher(lambda queries: (ran_in.append(threading.get_ident()), model.recommend(queries))[1])
    assert_equal(batcher.recommend(query), model.recommend([query])[0])
    assert_equal(alone.recommend(query), model.recommend([query])[0])
    assert [run.size for run in runs] == [1]
    assert ran_in == [caller]


def test_requests_that_wait_go_together(model: Recommender) -> None:
    gated, runs = GatedModel(model), list[Run]()
    batcher = Batcher(gated.recommend, largest_batch=8, on_run=runs.append)
    queries = queries_of(model, 21)
    with busy(batcher, gated, queries[0]) as pool:
        answers = [pool.submit(batcher.recommend, query) for query in queries[1:]]
        wait_until(lambda: len(batcher._queue) == 20)
    assert [run.size for run in runs] == [1, 8, 8, 4]
    for query, answer in zip(queries[1:], answers, strict=True):
        assert_equal(answer.result(), model.recommend([query])[0])


def test_no_row_reaches_another_under_concurrency(model: Recommender, store: EventStore) -> None:
    queries = queries_of(model, 200)
    for number, query in enumerate(queries[::2]):
        store.record([UserEvent(f"{number}-{at}", f"u{number}", event) for at, event in enumerate(query.events)])
    asked = list(queries)
    asked[::2] = [query._replace(events=(), user_id=f"u{number}") for number, query in enumerate(queries[::2])]
    batcher = Batcher(StateCache(model, store, capacity=30).recommend, capacity=1000)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(batcher.recommend, asked * 3))
    for query, answer in zip(queries * 3, answers, strict=True):
        assert_equal(answer, model.recommend([query])[0])


def test_a_full_queue_says_so_at_once(model: Recommender) -> None:
    gated = GatedModel(model)
    batcher = Batcher(gated.recommend, capacity=3)
    queries = queries_of(model, 4)
    with busy(batcher, gated, queries[0]) as pool:
        waiting = [pool.submit(batcher.recommend, query) for query in queries[1:]]
        wait_until(lambda: len(batcher._queue) == 3)
        with pytest.raises(QueueFull, match="3 requests wait already") as full:
            batcher.recommend(queries[0])
        assert 0 < full.value.retry_after_s <= 10
    assert len([one.result() for one in waiting]) == 3
    assert_equal(batcher.recommend(queries[0]), model.recommend(queries[:1])[0])


def test_expired_and_cancelled_requests_cost_no_run(model: Recommender) -> None:
    gated = GatedModel(model)
    batcher = Batcher(gated.recommend)
    first, expired, cancelled, wanted = queries_of(model, 4)
    with busy(batcher, gated, first) as pool:
        late: Future[Answer] = pool.submit(batcher.recommend, expired, 0.0)
        gone: Future[Answer] = pool.submit(batcher.recommend, cancelled, None, lambda: True)
        stays = pool.submit(batcher.recommend, wanted, PATIENCE_S, lambda: False)
        wait_until(lambda: len(batcher._queue) == 3)
    assert gated.queries == [first, wanted]
    with pytest.raises(Expired):
        late.result()
    with pytest.raises(Cancelled):
        gone.result()
    assert_equal(stays.result(), model.recommend([wanted])[0])


def test_an_answer_that_comes_too_late_is_not_given(model: Recommender) -> None:
    gone = threading.Event()

    def answer(queries: Sequence[Query]) -> list[Answer]:
        gone.set()
        return model.recommend(queries)

    with pytest.raises(Cancelled):
        Batcher(answer).recommend(queries_of(model, 1)[0], is_cancelled=gone.is_set)


def test_one_bad_request_fails_alone(model: Recommender) -> None:
    def answer(queries: Sequence[Query]) -> list[Answer]:
        if any(query.k == 13 for query in queries):
            raise ValueError("no thirteen here")
        return model.recommend(queries)

    gated = GatedModel(model)
    first, *rest = [query._replace(k=5) for query in queries_of(model, 6)]
    rest[2] = rest[2]._replace(k=13)
    gated_answer = Batcher(lambda queries: gated.recommend(queries) and answer(queries))
    with busy(gated_answer, gated, first) as pool:
        answers = [pool.submit(gated_answer.recommend, query) for query in rest]
        wait_until(lambda: len(gated_answer._queue) == 5)
    with pytest.raises(ValueError, match="no thirteen"):
        answers.pop(2).result()
    del rest[2]
    for query, found in zip(rest, answers, strict=True):
        assert_equal(found.result(), model.recommend([query])[0])


def test_rows_of_like_length_share_a_run() -> None:
    assert like_lengths([7]) == [[0]]
    assert like_lengths([50, 3, 48, 200, 9, 190, 1]) == [[3, 5], [0, 2], [4, 1, 6]]
    # Each is padded by a tenth of the longest, but the last by more than a quarter.
    assert like_lengths([100, 90, 80, 70]) == [[0, 1, 2], [3]]


def test_batchers_take_turns_in_a_thread(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ThreadPoolExecutor(1)
    monkeypatch.setattr("serve.serving.batching.RUNNERS", runner)
    order: list[str] = []
    gated, done, query = GatedModel(model), threading.Semaphore(0), Query((), 3)

    def first(queries: Sequence[Query]) -> list[Answer]:
        order.append("first")
        return gated.recommend(queries)

    def second(queries: Sequence[Query]) -> list[Answer]:
        order.append("second")
        return model.recommend(queries)

    with runner:
        busy, other = Batcher(first, largest_batch=1), Batcher(second)
        for _ in range(3):
            busy.put(query, None, None, done.release)
        busy.run(0.0)
        assert gated.started.wait(PATIENCE_S)
        other.put(query, None, None, done.release)
        other.run(0.0)
        gated.gate.set()
        for _ in range(4):
            assert done.acquire(timeout=PATIENCE_S)
    assert order == ["first", "second", "first", "first"]


@pytest.mark.parametrize(
    ("asked", "answers_at_once", "is_here"),
    [
        (True, lambda model, queries: model.recommend(queries), True),
        (False, lambda model, queries: model.recommend(queries), False),
        (True, lambda model, queries: None, False),
        (True, lambda model, queries: 1 / 0, False),
    ],
    ids=["short", "not asked for", "has to wait", "fails"],
)
def test_a_short_run_is_made_where_it_is_asked_for(
    model: Recommender,
    asked: bool,
    answers_at_once: Callable[[Recommender, Sequence[Query]], list[Answer] | None],
    is_here: bool,
) -> None:
    threads, done, runs = list[int](), threading.Semaphore(0), list[Run]()

    def at_once(queries: Sequence[Query]) -> list[Answer] | None:
        return answers_at_once(model, queries)

    def finished() -> None:
        threads.append(threading.get_ident())
        done.release()

    batcher = Batcher(model.recommend, on_run=runs.append, at_once=at_once)
    queries = queries_of(model, 3)
    batcher.complete(queries)
    runs.clear()
    pending = [batcher.put(query, None, None, finished) for query in queries]
    batcher.run(PATIENCE_S if asked else 0.0)
    for _ in queries:
        assert done.acquire(timeout=PATIENCE_S)
    for query, one in zip(queries, pending, strict=True):
        assert_equal(one.result(), model.recommend([query])[0])
    assert [run.size for run in runs] == [3]
    assert [thread == threading.get_ident() for thread in threads] == [is_here] * 3
    # And the next one is not held up.
    assert_equal(batcher.recommend(queries[0]), model.recommend(queries[:1])[0])


def test_runs_that_took_long_are_made_in_another_thread(model: Recommender) -> None:
    asked, done = list[int](), threading.Semaphore(0)
    batcher = Batcher(model.recommend, at_once=lambda queries: asked.append(len(queries)))
    (query,) = queries_of(model, 1)
    batcher.recommend(query)
    batcher.put(query, None, None, done.release)
    batcher.run(1e-9)
    assert done.acquire(timeout=PATIENCE_S)
    assert asked == []


def test_one_run_of_a_size_says_how_long_the_next_takes(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not runs of other sizes, and not those before."""
    now, seconds, done, asked = [0.0], {1: 5.0, 4: 0.1}, threading.Semaphore(0), list[int]()
    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def answer(queries: Sequence[Query]) -> list[Answer]:
        now[0] += seconds[len(queries)]
        return model.recommend(queries)

    def at_once(queries: Sequence[Query]) -> list[Answer]:
        asked.append(len(queries))
        return answer(queries)

    batcher = Batcher(answer, at_once=at_once)
    queries = queries_of(model, 4)

    def run(size: int) -> list[int]:
        asked.clear()
        for query in queries[:size]:
            batcher.put(query, None, None, done.release)
        batcher.run(1.0)
        for _ in range(size):
            assert done.acquire(timeout=PATIENCE_S)
        wait_until(lambda: not batcher._running)
        return list(asked)

    # Nothing is known at first.
    assert (run(4), run(4)) == ([], [4])
    # At most as long as one of four, which proves wrong.
    assert (run(1), run(1)) == ([1], [])
    assert run(4) == [4]
    seconds[1] = 0.1
    assert (run(1), run(1)) == ([], [1])


@pytest.mark.parametrize("here", [True, False])
def test_what_can_wait_is_done_once_all_of_a_run_are_told(model: Recommender, here: bool) -> None:
    order, done = list[str](), threading.Semaphore(0)

    def told(name: str) -> Callable[[], None]:
        def later() -> None:
            order.append(f"later {name}")
            done.release()

        order.append(name)
        return later

    batcher = Batcher(model.recommend, at_once=model.recommend)
    queries = queries_of(model, 3)
    batcher.complete(queries)
    for name, query in zip("abc", queries, strict=True):
        batcher.put(query, None, None, partial(told, name))
    batcher.run(PATIENCE_S if here else 0.0)
    for _ in queries:
        assert done.acquire(timeout=PATIENCE_S)
    assert order == ["a", "b", "c", "later a", "later b", "later c"]


def test_more_than_a_run_takes_go_on_in_another_thread(model: Recommender) -> None:
    runs, done = list[Run](), threading.Semaphore(0)
    batcher = Batcher(model.recommend, largest_batch=2, on_run=runs.append, at_once=model.recommend)
    queries = queries_of(model, 5)
    batcher.complete(queries[:2])
    runs.clear()
    pending = [batcher.put(query, None, None, done.release) for query in queries]
    batcher.run(PATIENCE_S)
    for _ in queries:
        assert done.acquire(timeout=PATIENCE_S)
    for query, one in zip(queries, pending, strict=True):
        assert_equal(one.result(), model.recommend([query])[0])
    assert [run.size for run in runs] == [2, 2, 1]


def test_cancelled_requests_cost_no_run_here_either(model: Recommender) -> None:
    asked, done = list[int](), threading.Semaphore(0)
    batcher = Batcher(model.recommend, at_once=lambda queries: asked.append(len(queries)))
    (query,) = queries_of(model, 1)
    batcher.recommend(query)
    pending = batcher.put(query, None, lambda: True, done.release)
    batcher.run(PATIENCE_S)
    assert done.acquire(timeout=PATIENCE_S)
    with pytest.raises(Cancelled):
        pending.result()
    assert asked == []

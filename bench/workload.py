"""What bench/latency.py asks of every server: histories of random items, with and without a filter."""

import csv
import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime

from serve.client import Event, ItemFilter
from serve.model.ranking.search import NEVER

HISTORIES = 64
START = 1_600_000_000
DAY = 86_400
ALLOWED = 1_000
"""Items in the list of a filter."""
Feed = dict[str, Any]


def graph_session(model: Path, name: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model / f"{name}.onnx", options, providers=["CPUExecutionProvider"])


def sequence_feed(items: np.ndarray, k: int, item_count: int) -> Feed:
    """One history as `sequence.onnx` takes it: an event a day, no ratings, a request a day after the last; without a
    trend, as models of bench/make_model.py are, and with nothing blocked."""
    gap = np.full((1, len(items)), DAY, np.float32)
    gap[0, 0] = -1
    return {
        "item": items[None],
        "rating": np.full((1, len(items)), -1, np.float32),
        "gap": gap,
        "length": np.array([len(items)], np.int32),
        "request_gap": np.array([DAY], np.float32),
        "exclude": items[None],
        "k": np.array([k], np.int64),
        "trend": np.zeros(item_count + 1, np.float32),
        "blocked": np.zeros((1, item_count + 1), bool),
    }


@dataclass(frozen=True)
class Workload:
    """What all targets are asked: the same histories, in the form that each of them takes."""

    model: Path
    k: int
    histories: list[list[Event]]
    request_time: int
    feeds: list[Feed]
    sequence: onnxruntime.InferenceSession
    step: onnxruntime.InferenceSession
    expected: list[list[str]]
    """Raw ids of the answers, by `session.run`."""
    ids: list[str]
    """Raw ids by item index."""
    filters: dict[str, tuple[ItemFilter, list[list[str]]]]
    """By name a filter, and the raw ids of the answers with it."""


def workload(model: Path, length: int, k: int) -> Workload:
    """Asks for `k` items after histories of `length` events."""
    with (model / "catalog.csv").open(encoding="utf-8", newline="") as file:
        rows_of_catalog = list(csv.DictReader(file))
    item_ids = ["", *(row["item_id"] for row in rows_of_catalog)]
    tags = [(), *(row["genres"].split("|") for row in rows_of_catalog)]
    if len(item_ids) - 1 < length + k:
        raise click.BadParameter(f"{len(item_ids) - 1} items are too few for {length} events and {k} answers")
    random = np.random.default_rng(0)
    rows = [random.choice(len(item_ids) - 1, length, replace=False).astype(np.int32) + 1 for _ in range(HISTORIES)]
    sequence = graph_session(model, "sequence")
    feeds = [sequence_feed(row, k, len(item_ids) - 1) for row in rows]
    tag, _ = Counter(itertools.chain(*tags)).most_common(1)[0]
    allowed = random.permutation(len(item_ids) - 1)[:ALLOWED] + 1

    def answers(blocked: np.ndarray) -> list[list[str]]:
        found = [sequence.run(["items", "scores"], {**feed, "blocked": blocked[None]}) for feed in feeds]
        return [[item_ids[item] for item in items[0][scores[0] > NEVER / 2]] for items, scores in found]

    nothing, of_tag = np.zeros(len(item_ids), bool), np.array([tag not in of_item for of_item in tags])
    of_list = np.isin(np.arange(len(item_ids)), allowed, invert=True)
    return Workload(
        model=model,
        k=k,
        histories=[
            [Event(item_id=item_ids[item], timestamp=START + DAY * at) for at, item in enumerate(row)] for row in rows
        ],
        request_time=START + DAY * length,
        feeds=feeds,
        sequence=sequence,
        step=graph_session(model, "step"),
        expected=answers(nothing),
        ids=item_ids,
        filters={
            "one tag": (ItemFilter(any_tags=[tag]), answers(of_tag)),
            f"{len(allowed):,} allowed items": (
                ItemFilter(allow_item_ids=[item_ids[item] for item in allowed]),
                answers(of_list),
            ),
        },
    )


def step_feed(session: onnxruntime.InferenceSession, feed: Feed) -> Feed:
    """The last event of such a history, on a state of zeros: what it holds makes no difference to the time."""
    (width,) = (node.shape[-1] for node in session.get_inputs() if node.name == "state")
    last = {name: feed[name][:, -1] for name in ("item", "rating", "gap")}
    asked = {name: feed[name] for name in ("request_gap", "exclude", "k", "trend", "blocked")}
    return {"state": np.zeros((1, width), np.float32), **last, **asked}

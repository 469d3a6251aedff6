"""Prepared data in a form that two results can be compared in, whatever the order of their ids."""

import numpy as np

from jaxrec.data.prepared import PreparedData


def by_user(data: PreparedData) -> dict:
    """By raw user id: its events as (time, raw item, rating), how many of them train, and the validation and test
    targets."""
    histories = data.histories
    items = data.catalog.ids.decode(histories.items).tolist() if histories.event_count else []
    ratings = np.nan_to_num(histories.ratings, nan=-1.0).tolist()
    events = list(zip(histories.times.tolist(), items, ratings, strict=True))
    result = {}
    for user, raw in enumerate(data.users.raw_ids.tolist()):
        first, stop = histories.offsets[user], histories.offsets[user + 1]
        targets = [
            [int(row - first) for row in cases.rows[cases.users == user]]
            for cases in (data.split.validation, data.split.test)
        ]
        result[raw] = (events[first:stop], int(data.split.train_counts[user]), *targets)
    return result

"""The bench of what users without a history are shown, on a log that changes from one item to another."""

import numpy as np
import pandas as pd

from bench.fallback import DAY_S, DAYS, POPULARITY, PRIORS, ranks, table
from jaxrec.config import PrepareConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.schema import ITEM, TIME, USER


def test_recent_events_rank_what_is_new_first() -> None:
    """Until day 80 users take the items 1 and 2, a hundred a day, and from then on 3 and 4."""
    rows = [
        (100 * day + user, item, DAY_S * day + 100 * user + item)
        for day in range(100)
        for user in range(100)
        for item in ((1, 2) if day < 80 else (4, 3))
    ]
    log = pd.DataFrame(rows, columns=[USER, ITEM, TIME])
    data = prepare(log, config=PrepareConfig(min_user_ratings=1, min_movie_ratings=1))
    found = ranks(data)
    # The first 80 % are those of 80 days, so that 20 days of a hundred new users are left, who begin with item 3.
    assert set(found) == {POPULARITY, *((days, prior) for days in DAYS for prior in PRIORS)}
    assert {len(of_way) for of_way in found.values()} == {2_000}
    # Neither of the new items is in the training data: ties count against the target.
    np.testing.assert_array_equal(found[POPULARITY], 4)
    late = found[1, 100][500:]
    assert (late <= 2).all()
    assert found[1, 100].mean() < found[30, 10_000].mean()
    lines = table("changing", found)
    assert lines[1] == "2000 users.\n"
    assert sum("**" in line for line in lines) == 1
    assert lines[4].endswith(" |  |")
    assert all(line.count(" to ") == 2 for line in lines[5:])

"""Made-up decisions on the items of `small_data`: the next item follows one feature, beside the mix."""

import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.models.reranker import CONTEXT, FEATURES
from jaxrec.rl.logged.decisions import Decisions

ITEMS = 20


def decisions(data: PreparedData, users: range, strength: float, each: int = 25) -> Decisions:
    """`each` decisions of each user, whose next item is drawn from softmax(mix + strength * feature "rating")."""
    rng = np.random.default_rng(users.start)
    user = np.repeat(np.array(users), each)
    count = len(user)
    row = data.histories.offsets[user] + 1 + np.tile(np.arange(each), len(users))
    items = np.stack([rng.permutation(60)[:ITEMS] + 1 for _ in range(count)])
    mix = -np.sort(-rng.normal(size=(count, ITEMS)), axis=1)
    features = rng.normal(size=(count, ITEMS, len(FEATURES)))
    chances = mix + strength * features[:, :, FEATURES.index("rating")]
    place = np.argmax(chances + rng.gumbel(size=chances.shape), axis=1)
    return Decisions(
        user.astype(np.int32),
        row.astype(np.int64),
        items[np.arange(count), place].astype(np.int32),
        np.arange(count) % 2 == 0,
        (place + 1).astype(np.int32),
        place.astype(np.int32),
        items.astype(np.int32),
        mix.astype(np.float32),
        features.astype(np.float16),
        rng.normal(size=(count, len(CONTEXT))).astype(np.float32),
    )

"""What rules ask a loaded model, and what they make of its answers; `serve.model.rules` has the rules themselves."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.model.filters import ItemFilter
from serve.model.live_catalog import LiveCatalog
from serve.model.popular import FALLBACKS
from serve.model.ranking.engine import Basis
from serve.model.recommender import Answer, Origin, Query, Recommender
from serve.model.rules import Candidates, Model, Rules, Scale, boosted, chosen, merged
from serve.serving.reranker import Candidate, RerankRequest


def more_queries(query: Query, rules: Rules, live: LiveCatalog) -> list[Query]:
    """What has to be asked for the candidates that need not be among the best items: those that rules name, and the
    best ones with their tags.

    Args:
        query: For the best items; `query.k` is the number of candidates.
        rules: What is wanted.
        live: The model's catalogue.
    """
    of_tag = live.filters.of_tag
    groups = [np.array(rules.items, np.int32), *(of_tag.get(tag, _NOTHING) for tag in rules.tags)]
    asked = query.filter or ItemFilter()
    found = []
    for group in groups:
        items = group if asked.items is None else np.intersect1d(group, asked.items).astype(np.int32)
        if len(items):
            k = min(query.k, len(items))
            found.append(query._replace(k=k, filter=asked._replace(items=items)))
    return found


_NOTHING: NDArray[np.int32] = np.zeros(0, np.int32)


def candidates_of(answers: Sequence[Answer], rules: Rules, live: LiveCatalog) -> Candidates:
    """The candidates in their boosted order.

    Args:
        answers: To the query for the best items, then to `more_queries`.
        rules: What is wanted.
        live: The model's catalogue.
    """
    best, *more = answers
    ranked = merged((best.items, best.scores), [(one.items, one.scores) for one in more])
    candidates = Candidates.of(*ranked, Scale.of(best.scores))
    return boosted(candidates, rules.boosts, live.filters.of_tag, logits=best.policy not in FALLBACKS)


class Origins:
    """How items came into an answer with rules: those of several answers, each from the first one that has it."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        """Of the answers to the query for the best items, then to `more_queries`."""
        best, *more = answers
        self._bases = [best.basis]
        self._seen = set(best.items.tolist())
        self.found: dict[int, Origin] = {}
        last = float(best.scores[-1]) if len(best.items) else math.inf
        for answer in more:
            self.add(answer, last)

    def add(self, answer: Answer, last: float = math.inf) -> None:
        """Another one, whose items have at most the score `last` (`serve.model.rules.merged`)."""
        basis = next((one for one in self._bases if _same(one, answer.basis)), answer.basis)
        if basis is answer.basis:
            self._bases.append(basis)
        for item, score in zip(answer.items.tolist(), answer.scores.tolist(), strict=True):
            if item not in self._seen:
                self._seen.add(item)
                self.found[item] = Origin(basis, min(0.0, last - score))


def _same(one: Basis | None, other: Basis | None) -> bool:
    """Whether the same scores follow from both."""
    if one is None or other is None:
        return one is other
    alike = one.trend is other.trend and one.request_gap == other.request_gap
    return alike and np.array_equal(one.state, other.state)


def without_full_tags(query: Query, rules: Rules, answer: Candidates, live: LiveCatalog) -> Query:
    """The query for items that can still be added to an answer, as `max_per_tag` is concerned."""
    counts = Counter(tag for item in answer.items.tolist() for tag in live.catalog.genres[item])
    full = {tag for tag, count in counts.items() if count >= rules.max_per_tag}
    asked = query.filter or ItemFilter()
    return query._replace(filter=asked._replace(none_tags=tuple(sorted(full.union(asked.none_tags)))))


def followed_by(candidates: Candidates, wider: Candidates) -> Candidates:
    """The candidates, and behind them what is not there yet."""
    new, scale = ~np.isin(wider.items, candidates.items), candidates.scale
    return Candidates(
        np.concatenate([candidates.items, wider.items[new]]),
        np.concatenate([candidates.scores, wider.scores[new]]),
        np.concatenate([candidates.relevance, scale.relevance(wider.scores[new])]),
        scale,
        {**wider.applied, **candidates.applied},
    )


def choose(
    candidates: Candidates, k: int, rules: Rules, model: Recommender, live: LiveCatalog, first: int | None = None
) -> Candidates:
    """As `serve.model.rules.chosen`, with a model's tags and vectors."""
    directions = model.directions(candidates.items, live) if rules.diversity else np.zeros((0, 0), np.float32)
    return chosen(candidates, k, rules, Model(live.catalog.genres, directions), first)


def for_reranker(candidates: Candidates, live: LiveCatalog) -> list[Candidate]:
    """The candidates as an own re-ranker gets them."""
    catalog = live.catalog
    return [
        Candidate(
            catalog.item_ids[item], score, catalog.titles[item], catalog.genres[item], live.metadata.get(item, {})
        )
        for item, score in zip(candidates.items.tolist(), candidates.scores.tolist(), strict=True)
    ]


def rerank_request(query: Query, policy: str) -> RerankRequest:
    """What an own re-ranker is told of a query."""
    return RerankRequest(query.user_id, query.events, query.k, query.request_time, policy)

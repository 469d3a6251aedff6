"""Rules after the model: boosts, an own re-ranker, diversity, at most n items of a tag, and pins, in this order.

They work on candidates, the best items by the model. More of these than are asked for, since a rule has to have
something to choose from: see `candidate_count`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

CANDIDATES = 200
"""At least so many candidates. Of 3,650 movies the first 200 hold the next one of 64 % of the users, the first 50 of
41 % (bench/diversity.md); to choose ten of 200 takes some 0.2 ms."""
CANDIDATES_OF_A_PLACE = 4
"""And for each place that is asked for so many: so that there is a choice for the last one too."""


class Applied(IntEnum):
    """What changed the score or the place of an item, in the order in which it is applied."""

    BOOST = 1
    RERANKER = 2
    DIVERSITY = 3
    MAX_PER_TAG = 4
    PIN = 5


class Subject(NamedTuple):
    """What a boost or a pin is about: an item or a tag."""

    item: int = 0
    """Its index; 0: the tag counts."""
    tag: str = ""


class Boost(NamedTuple):
    """Multiplies the weight of items."""

    subject: Subject
    factor: float
    """Above 0."""


class Pin(NamedTuple):
    """Puts an item at a place."""

    subject: Subject
    position: int
    """From 1 on."""


class Rules(NamedTuple):
    """What a request wants to be done after the model."""

    boosts: tuple[Boost, ...] = ()
    diversity: float = 0.0
    """The weight of the similarity against the score, 0 to 1."""
    max_per_tag: int = 0
    """0: any number."""
    pins: tuple[Pin, ...] = ()
    """By position, each position once."""

    @property
    def only_boosts(self) -> bool:
        """Whether no rule chooses items or places, so that slates can be drawn by the boosted scores."""
        return not (self.diversity or self.max_per_tag or self.pins)

    @property
    def items(self) -> list[int]:
        """Those that have to be candidates, in order. To be boosted down, an item need not be one."""
        return sorted({subject.item for subject in self._needed()} - {0})

    @property
    def tags(self) -> list[str]:
        """Those whose best items have to be candidates."""
        return sorted({subject.tag for subject in self._needed()} - {""})

    def _needed(self) -> list[Subject]:
        return [*(boost.subject for boost in self.boosts if boost.factor > 1), *(pin.subject for pin in self.pins)]


NO_RULES = Rules()


def candidate_count(k: int) -> int:
    """How many items the model has to rank for rules.

    >>> candidate_count(10), candidate_count(100)
    (200, 400)
    """
    return max(CANDIDATES, CANDIDATES_OF_A_PLACE * k)


class Scale(NamedTuple):
    """Of relevance: what pins, boosts and further candidates add does not change it, nor does k."""

    lowest: float
    """The score of the 200th item by the model, or of the last one if there are fewer."""
    span: float
    """To the score of the best item; above 0."""

    @classmethod
    def of(cls, scores: NDArray[np.float32]) -> Self:
        """Of the model's ranking.

        Args:
            scores: `[n]`, not increasing, without boosts.
        """
        if not len(scores):
            return cls(0.0, 1.0)
        lowest = float(scores[min(CANDIDATES, len(scores)) - 1])
        return cls(lowest, (float(scores[0]) - lowest) or 1.0)

    def relevance(self, scores: NDArray[np.float32]) -> NDArray[np.float64]:
        """`[n]`: 1 for the best item, below 0 for what is behind the 200th one. Not cut there, since all of these
        would be alike."""
        return (scores.astype(np.float64) - self.lowest) / self.span


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Items in the order in which they would be answered."""

    items: NDArray[np.int32]
    """`[n]`, each once."""
    scores: NDArray[np.float32]
    """`[n]`, with what boosts change."""
    relevance: NDArray[np.float64]
    """`[n]`, for diversity: not increasing. That is the score on the scale, unless the order is a re-ranker's."""
    scale: Scale
    applied: Mapping[int, tuple[Applied, ...]]
    """By item, what changed it; others are missing."""

    @classmethod
    def of(cls, items: NDArray[np.int32], scores: NDArray[np.float32], scale: Scale | None = None) -> Self:
        """By their scores.

        Args:
            items: `[n]`, each once.
            scores: `[n]`, not increasing.
            scale: None: the scores are all those of the model, and the scale is theirs.
        """
        scale = scale or Scale.of(scores)
        return cls(items, scores, scale.relevance(scores), scale, {})

    def __len__(self) -> int:
        return len(self.items)

    def at(self, places: Sequence[int] | NDArray[np.intp]) -> "Candidates":
        """Those at some places."""
        items = self.items[places]
        applied = {item: self.applied[item] for item in items.tolist() if item in self.applied}
        return Candidates(items, self.scores[places], self.relevance[places], self.scale, applied)


def merged(
    ranked: tuple[NDArray[np.int32], NDArray[np.float32]],
    more: Sequence[tuple[NDArray[np.int32], NDArray[np.float32]]],
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The best items by the model, with others that rules need.

    Args:
        ranked: Items `[n]` and scores `[n]`, best first.
        more: Other rankings. What is not among the first is behind it: its score is at most the last one there.

    Returns:
        Items, each once, and scores, best first.
    """
    items, scores = ranked
    if not len(items):
        return ranked
    found = dict(zip(items.tolist(), scores.tolist(), strict=True))
    last = float(scores[-1])
    for of_items, of_scores in more:
        for item, score in zip(of_items.tolist(), of_scores.tolist(), strict=True):
            found.setdefault(item, min(score, last))
    all_items, all_scores = np.array(list(found), np.int32), np.array(list(found.values()), np.float32)
    order = np.argsort(-all_scores, kind="stable")
    return all_items[order], all_scores[order]


def boost_log_factors(
    items: NDArray[np.int32], boosts: Sequence[Boost], of_tag: Mapping[str, NDArray[np.int32]]
) -> NDArray[np.float64]:
    """`[n]`: the logarithms of what the weights of `items` `[n]` are multiplied with. `of_tag`: item indices by tag."""
    log_factors = np.zeros(len(items))
    for one in boosts:
        boosted = [one.subject.item] if one.subject.item else of_tag.get(one.subject.tag, ())
        log_factors[np.isin(items, boosted)] += math.log(one.factor)
    return log_factors


def boosted(
    candidates: Candidates, boosts: Sequence[Boost], of_tag: Mapping[str, NDArray[np.int32]], *, logits: bool
) -> Candidates:
    """The candidates in the order of their boosted scores; equal scores stay in their order.

    Args:
        candidates: As the model has them.
        boosts: Several of an item are multiplied.
        of_tag: Item indices by tag.
        logits: Whether scores are logits, to which the logarithm of the factor is added; else they are multiplied.
    """
    if not boosts:
        return candidates
    log_factors = boost_log_factors(candidates.items, boosts, of_tag)
    before = candidates.scores
    changed = before + log_factors if logits else before * np.exp(log_factors)
    # The others to the bit as they were.
    scores = np.where(log_factors == 0, before, changed.astype(np.float32))
    order = np.argsort(-scores, kind="stable")
    moved = candidates.items[log_factors != 0].tolist()
    found = Candidates.of(candidates.items[order], scores[order], candidates.scale)
    return replace(found, applied=_with(candidates.applied, moved, Applied.BOOST))


def reordered(candidates: Candidates, order: Sequence[int]) -> Candidates:
    """The candidates in the order of a re-ranker.

    Args:
        candidates: As they are.
        order: Their places, each at most once; those that are not there follow in their order.
    """
    places = list(dict.fromkeys([*order, *range(len(candidates))]))
    moved = [int(candidates.items[place]) for at, place in enumerate(places) if at != place]
    return Candidates(
        candidates.items[places],
        candidates.scores[places],
        # What is first is most relevant.
        np.sort(candidates.relevance)[::-1],
        candidates.scale,
        _with(candidates.applied, moved, Applied.RERANKER),
    )


class Model(NamedTuple):
    """What choosing needs to know of items."""

    tags: Sequence[Sequence[str]]
    """By item index."""
    directions: NDArray[np.float32]
    """`[n, width]`, the item vectors of the candidates, each of length 1; empty if diversity is 0."""


def chosen(candidates: Candidates, k: int, rules: Rules, model: Model, first: int | None = None) -> Candidates:
    """The answer of at most k items: diverse, with at most so many of a tag, and with the pinned ones at their places.

    Args:
        candidates: At least those of the pins, as far as they may be answered.
        k: Number of items.
        rules: What is wanted; boosts are applied already.
        model: Tags and vectors.
        first: Diversity chooses from so many of the first candidates, and the others follow in their order; None: all.

    Returns:
        Fewer than k items if not so many may be answered, or `max_per_tag` allows no more of them.
    """
    pinned = _pinned(candidates, rules, model.tags)
    first = len(candidates) if first is None else first
    places = _places(candidates, k, rules, pinned, model, first)
    found = candidates.at(places)
    applied = found.applied
    of_pins = set(pinned.values())
    now, by_score = _free(places, of_pins), _free(range(len(candidates)), of_pins)
    if rules.max_per_tag:
        without = rules._replace(diversity=0.0)
        capped = _free(_places(candidates, k, without, pinned, model, first), of_pins) if rules.diversity else now
        applied = _with(applied, _moved(candidates, capped, by_score), Applied.MAX_PER_TAG)
        by_score = capped
    if rules.diversity:
        applied = _with(applied, _moved(candidates, now, by_score), Applied.DIVERSITY)
    applied = _with(applied, [int(candidates.items[place]) for place in pinned.values()], Applied.PIN)
    answered = found.items.tolist()
    kept = {item: tuple(sorted(applied[item])) for item in answered if item in applied}
    return replace(found, applied=kept)


def _free(places: Sequence[int], pinned: set[int]) -> list[int]:
    return [place for place in places if place not in pinned]


def _moved(candidates: Candidates, now: Sequence[int], before: Sequence[int]) -> list[int]:
    """The items that have another place than before, or had none."""
    was = {place: at for at, place in enumerate(before)}
    return [int(candidates.items[place]) for at, place in enumerate(now) if was.get(place) != at]


def _with(
    applied: Mapping[int, tuple[Applied, ...]], items: Sequence[int], rule: Applied
) -> Mapping[int, tuple[Applied, ...]]:
    return {**applied, **{item: (*applied.get(item, ()), rule) for item in items}}


def _pinned(candidates: Candidates, rules: Rules, tags: Sequence[Sequence[str]]) -> dict[int, int]:
    """The candidates' places of pinned items, by position; pins without a candidate are missing."""
    if not rules.pins:
        return {}
    caps, items = _Caps(rules.max_per_tag, candidates.items, tags), candidates.items.tolist()
    place_of = {item: place for place, item in enumerate(items)}
    # Items first: the best item with a tag is one that has no place yet, and of whose tags there may be one more.
    found = {pin.position: place_of[pin.subject.item] for pin in rules.pins if pin.subject.item in place_of}
    free = np.ones(len(items), np.bool_)
    for place in found.values():
        free[place] = False
        caps.take(place)
    for pin in rules.pins:
        if pin.subject.item:
            continue
        for place in np.flatnonzero(free & caps.allowed).tolist():
            if pin.subject.tag in tags[items[place]]:
                found[pin.position] = place
                free[place] = False
                caps.take(place)
                break
    return dict(sorted(found.items()))


def _places(
    candidates: Candidates, k: int, rules: Rules, pinned: Mapping[int, int], model: Model, first: int
) -> list[int]:
    """The candidates' places that are answered, in their order."""
    n, caps = len(candidates), _Caps(rules.max_per_tag, candidates.items, model.tags)
    for place in pinned.values():
        caps.take(place)
    free = np.ones(n, np.bool_)
    free[list(pinned.values())] = False
    relevance = candidates.relevance[:first]
    # Of each candidate, how much it is like one of those that have a place.
    likeness = np.full(first, -np.inf)
    found: list[int] = []
    left = list(pinned.items())
    while len(found) < k:
        place = -1
        if left and (left[0][0] == len(found) + 1):
            place = left.pop(0)[1]
        else:
            place = _next(free & caps.allowed, relevance, likeness, rules.diversity, first)
            if place < 0:
                break
            free[place] = False
            caps.take(place)
        found.append(place)
        if rules.diversity:
            cosines = model.directions[:first] @ model.directions[place]
            likeness = np.maximum(likeness, cosines.astype(np.float64))
    # There are fewer items than their positions say.
    return (found + [place for _, place in left])[:k]


def _next(
    allowed: NDArray[np.bool_],
    relevance: NDArray[np.float64],
    likeness: NDArray[np.float64],
    diversity: float,
    first: int,
) -> int:
    """The candidate of the next place; -1: there is none."""
    if diversity and np.isfinite(likeness).any() and allowed[:first].any():
        # Carbonell and Goldstein 1998, with the scores and cosines on like scales.
        worth = (1 - diversity) * relevance - diversity * likeness
        return int(np.where(allowed[:first], worth, -np.inf).argmax())
    return int(allowed.argmax()) if allowed.any() else -1


class _Caps:
    """At most so many items of each tag."""

    def __init__(self, most: int, items: NDArray[np.int32], tags: Sequence[Sequence[str]]) -> None:
        """`most` 0: any number."""
        self.allowed = np.ones(len(items), np.bool_)
        """`[n]`, the candidates of whose tags there may be one more."""
        self._most = most
        self._tags = [tags[item] for item in items.tolist()] if most else []
        self._counts: dict[str, int] = {}
        self._of_tag: dict[str, list[int]] = {}
        for place, of_item in enumerate(self._tags):
            for tag in of_item:
                self._of_tag.setdefault(tag, []).append(place)

    def take(self, place: int) -> None:
        """Counts an item."""
        if not self._most:
            return
        for tag in self._tags[place]:
            self._counts[tag] = self._counts.get(tag, 0) + 1
            if self._counts[tag] == self._most:
                self.allowed[self._of_tag[tag]] = False

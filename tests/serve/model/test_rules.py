"""Rules after the model, on arrays: each place is that of a plain loop over the candidates."""

import math
from collections import Counter

import numpy as np
import pytest

from serve.model.rules import (
    Applied,
    Boost,
    Candidates,
    Model,
    Pin,
    Rules,
    Scale,
    Subject,
    boosted,
    chosen,
    merged,
    reordered,
)

TAGS = ("a", "b", "c", "d")


def candidates_of(rng: np.random.Generator, n: int) -> Candidates:
    items = rng.permutation(np.arange(1, 2 * n + 1, dtype=np.int32))[:n]
    return Candidates.of(items, np.sort(rng.normal(size=n).astype(np.float32))[::-1])


def model_of(rng: np.random.Generator, candidates: Candidates, most_tags: int = 3) -> Model:
    count = int(candidates.items.max(initial=0)) + 1
    tags = [tuple(sorted(rng.choice(TAGS, rng.integers(0, most_tags + 1), replace=False))) for _ in range(count)]
    vectors = rng.normal(size=(len(candidates), 4)).astype(np.float32)
    return Model(tags, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def plain(candidates: Candidates, k: int, rules: Rules, model: Model) -> list[int]:
    """The items of the answer: place by place, each candidate looked at by itself."""
    n, items = len(candidates), candidates.items.tolist()
    pins: dict[int, int] = {}
    counts = Counter[str]()

    def is_full(place: int) -> bool:
        return bool(rules.max_per_tag) and any(counts[tag] >= rules.max_per_tag for tag in model.tags[items[place]])

    for pin in sorted(rules.pins, key=lambda pin: (not pin.subject.item, pin.position)):
        fits = [
            place
            for place in range(n)
            if place not in pins.values()
            and (
                items[place] == pin.subject.item
                if pin.subject.item
                else pin.subject.tag in model.tags[items[place]] and not is_full(place)
            )
        ]
        if fits:
            pins[pin.position] = fits[0]
            counts.update(model.tags[items[fits[0]]])
    scores = candidates.scores.astype(np.float64)
    span = scores.max() - scores.min() if n else 0
    relevance = [(score - scores.min()) / span if span else 0.0 for score in scores]
    answer: list[int] = []
    for position in range(1, k + 1):
        if position in pins:
            answer.append(pins.pop(position))
            continue
        possible = [
            place for place in range(n) if place not in answer and place not in pins.values() and not is_full(place)
        ]
        if not possible:
            break
        best = possible[0]
        if rules.diversity and answer:
            worth = {
                place: (1 - rules.diversity) * relevance[place]
                - rules.diversity * max(float(model.directions[place] @ model.directions[other]) for other in answer)
                for place in possible
            }
            best = max(possible, key=worth.__getitem__)
        answer.append(best)
        counts.update(model.tags[items[best]])
    answer += [pins[position] for position in sorted(pins)]
    return [items[place] for place in answer[:k]]


def test_each_place_is_that_of_a_plain_loop() -> None:
    kinds = Counter[str]()
    for seed in range(400):
        rng = np.random.default_rng(seed)
        candidates = candidates_of(rng, int(rng.integers(1, 25)))
        model, k = model_of(rng, candidates), int(rng.integers(1, 12))
        positions = rng.permutation(np.arange(1, k + 1))[: rng.integers(0, 4)]
        subjects = [
            Subject(item) if rng.random() < 0.6 else Subject(tag=str(rng.choice(TAGS)))
            for item in rng.permutation(candidates.items)[: len(positions)].tolist()
        ]
        pins = tuple(Pin(*one) for one in zip(subjects, sorted(positions.tolist()), strict=False))
        rules = Rules((), float(rng.choice([0, 0.3, 0.8, 1])), int(rng.choice([0, 0, 1, 2])), pins)
        found = chosen(candidates, k, rules, model)
        assert found.items.tolist() == plain(candidates, k, rules, model)
        # Each item has its own score.
        score_of = dict(zip(candidates.items.tolist(), candidates.scores.tolist(), strict=True))
        assert found.scores.tolist() == [score_of[item] for item in found.items.tolist()]
        assert len(set(found.items.tolist())) == len(found)
        for pin in pins:
            if pin.subject.item:
                at = found.items.tolist().index(pin.subject.item) + 1
                assert at == pin.position if len(found) == k else at <= pin.position
                assert Applied.PIN in found.applied[pin.subject.item]
        if rules.max_per_tag:
            # Of all items. Only items that are pinned themselves may be more: requests with such pins are refused.
            counts = Counter(tag for item in found.items.tolist() for tag in model.tags[item])
            of_pins = Counter(tag for pin in pins if pin.subject.item for tag in model.tags[pin.subject.item])
            assert all(count <= max(rules.max_per_tag, of_pins[tag]) for tag, count in counts.items())
        kinds.update(f"{rule.name}" for applied in found.applied.values() for rule in applied)
        kinds["short"] += len(found) < min(k, len(candidates))
        if rules == Rules():
            assert not found.applied
    assert min(kinds[name] for name in ("PIN", "DIVERSITY", "MAX_PER_TAG", "short")) > 50


def test_pinned_tags_keep_max_per_tag() -> None:
    """The best item with tag a has b too: then the next one with b may not be pinned, nor may it come by itself."""
    candidates = Candidates.of(np.array([1, 2, 3, 4], np.int32), np.array([4, 3, 2, 1], np.float32))
    model = Model([(), ("a", "b"), ("b",), ("c",), ("b", "c")], np.zeros((4, 1), np.float32))
    pins = (Pin(Subject(tag="a"), 1), Pin(Subject(tag="b"), 2))
    found = chosen(candidates, 3, Rules(max_per_tag=1, pins=pins), model)
    assert found.items.tolist() == [1, 3]
    assert found.applied == {1: (Applied.PIN,), 3: (Applied.MAX_PER_TAG,)}
    # An item that is pinned itself counts before all tags.
    pins = (Pin(Subject(tag="b"), 1), Pin(Subject(2), 2))
    assert chosen(candidates, 3, Rules(max_per_tag=2, pins=pins), model).items.tolist() == [1, 2, 3]
    assert chosen(candidates, 3, Rules(max_per_tag=1, pins=pins), model).items.tolist() == [3, 2]


def test_pins_boosts_and_further_candidates_do_not_change_what_diversity_means() -> None:
    """Three hundred candidates: the scale of relevance is that of the first 200 of the model."""
    rng = np.random.default_rng(0)
    items = np.arange(1, 301, dtype=np.int32)
    scores = np.linspace(3, 0, 300, dtype=np.float32)
    vectors = rng.normal(size=(301, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    tags: list[tuple[str, ...]] = [()] * 400

    def answered(candidates: Candidates, rules: Rules) -> list[int]:
        directions = vectors[np.minimum(candidates.items, 300)]
        return chosen(candidates, 10, rules, Model(tags, directions)).items.tolist()

    whole = Candidates.of(items, scores)
    np.testing.assert_allclose(whole.relevance[[0, 199]], [1, 0])
    assert whole.relevance[299] == pytest.approx(-100 / 199)
    first = answered(whole.at(np.arange(200)), Rules(diversity=0.3))
    assert answered(whole, Rules(diversity=0.3)) == first
    # A candidate from far behind, as a pin or a boost of it adds.
    far = Candidates.of(np.append(items, np.int32(301)), np.append(scores, np.float32(-500)), Scale.of(scores))
    assert answered(far, Rules(diversity=0.3)) == first
    up = boosted(far, [Boost(Subject(301), 100.0)], {}, logits=True)
    assert answered(up, Rules(diversity=0.3)) == first
    pinned = answered(far, Rules(diversity=0.3, pins=(Pin(Subject(301), 10),)))
    assert (pinned[:9], pinned[9]) == (first[:9], 301)
    # One that is boosted to the top changes what is above the others, not how relevant they are.
    top = boosted(whole, [Boost(Subject(5), 100.0)], {}, logits=True)
    kept = top.items != 5
    np.testing.assert_array_equal(top.relevance[kept], whole.relevance[whole.items != 5])


def test_without_rules_the_answer_is_the_first_candidates_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    candidates = candidates_of(rng, 50)
    found = chosen(candidates, 10, Rules(), model_of(rng, candidates))
    np.testing.assert_array_equal(found.items, candidates.items[:10])
    np.testing.assert_array_equal(found.scores.view(np.int32), candidates.scores[:10].view(np.int32))


def test_diversity_of_one_looks_at_vectors_alone() -> None:
    """Three items in two directions: the second of the first direction comes last."""
    candidates = Candidates.of(np.array([1, 2, 3], np.int32), np.array([3, 2, 1], np.float32))
    model = Model([()] * 4, np.array([[1, 0], [1, 0], [0, 1]], np.float32))
    assert chosen(candidates, 3, Rules(diversity=1.0), model).items.tolist() == [1, 3, 2]
    # 2: .5 * .5 - .5 * 1 = -.25; 3: .5 * 0 - .5 * 0 = 0.
    found = chosen(candidates, 3, Rules(diversity=0.5), model)
    assert found.items.tolist() == [1, 3, 2]
    assert found.applied == {3: (Applied.DIVERSITY,), 2: (Applied.DIVERSITY,)}
    # 2: .8 * .5 - .2 * 1 = .2; 3: 0.
    assert chosen(candidates, 3, Rules(diversity=0.2), model).items.tolist() == [1, 2, 3]


def test_each_changed_item_says_which_rule_moved_it() -> None:
    candidates = Candidates.of(np.array([1, 2, 3, 4], np.int32), np.array([4, 3, 2, 1], np.float32))
    model = Model([(), ("a",), ("a",), (), ()], np.zeros((4, 1), np.float32))
    found = chosen(candidates, 3, Rules(max_per_tag=1), model)
    assert found.items.tolist() == [1, 3, 4]
    assert found.applied == {3: (Applied.MAX_PER_TAG,), 4: (Applied.MAX_PER_TAG,)}
    found = chosen(candidates, 3, Rules(pins=(Pin(Subject(4), 2),)), model)
    assert (found.items.tolist(), found.applied) == ([1, 4, 2], {4: (Applied.PIN,)})
    # Of fewer items than the positions say.
    found = chosen(candidates, 9, Rules(pins=(Pin(Subject(1), 8), Pin(Subject(tag="a"), 9))), model)
    assert found.items.tolist() == [3, 4, 1, 2]


@pytest.mark.parametrize("logits", [True, False])
def test_boosts_multiply_weights(logits: bool) -> None:
    candidates = Candidates.of(np.array([1, 2, 3, 4], np.int32), np.array([4, 3, 2, 1], np.float32))
    of_tag = {"a": np.array([3, 4], np.int32)}
    boosts = (Boost(Subject(tag="a"), 10.0), Boost(Subject(3), 0.5), Boost(Subject(2), 0.1))
    found = boosted(candidates, boosts, of_tag, logits=logits)
    factors = {1: 1.0, 2: 0.1, 3: 5.0, 4: 10.0}
    expected = {
        item: score + math.log(factors[item]) if logits else score * factors[item]
        for item, score in zip([1, 2, 3, 4], [4, 3, 2, 1], strict=True)
    }
    assert found.items.tolist() == sorted(expected, key=expected.__getitem__, reverse=True)
    assert found.scores.tolist() == pytest.approx(sorted(expected.values(), reverse=True))
    assert found.applied == {item: (Applied.BOOST,) for item in (2, 3, 4)}


def test_a_re_rankers_order_is_kept_and_others_follow() -> None:
    candidates = Candidates.of(np.array([5, 6, 7, 8], np.int32), np.array([4, 3, 2, 1], np.float32))
    found = reordered(candidates, [2, 0])
    assert found.items.tolist() == [7, 5, 6, 8]
    assert found.scores.tolist() == [2, 4, 3, 1]
    assert found.relevance.tolist() == [1, 2 / 3, 1 / 3, 0]
    assert found.applied == {item: (Applied.RERANKER,) for item in (7, 5, 6)}
    assert reordered(candidates, []).items.tolist() == [5, 6, 7, 8]


def test_other_rankings_are_behind_the_best_items() -> None:
    """An item that is not among the best has at most the score of the last of them, whatever another ranking says."""
    best = np.array([1, 2], np.int32), np.array([5, 4], np.float32)
    other = np.array([3, 2], np.int32), np.array([9, 4], np.float32)
    third = np.array([4], np.int32), np.array([1], np.float32)
    items, scores = merged(best, [other, third])
    assert (items.tolist(), scores.tolist()) == ([1, 2, 3, 4], [5, 4, 4, 1])
    nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
    assert not len(merged(nothing, [])[0])

"""Which items a request allows, from its message. Each failure is an InvalidRequest."""

import math
from collections.abc import Mapping, Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from serve.api.errors import InvalidRequest, Violations
from serve.api.rules import MAX_ALLOWED_ITEMS, MAX_EXCLUDED_ITEMS, MAX_TAGS, check_ids, check_length
from serve.model.filters import ItemFilter
from serve.model.live_catalog import LiveCatalog
from serve.model.recommender import Recommender
from serve.pb import recommender_pb2 as pb
from serve.serving.errors import shown

SEEN = frozenset(pb.Seen.values())
NO_ITEMS = np.zeros(0, np.int32)


def decode_filter(
    request: pb.RecommendRequest | pb.SimilarItemsRequest | pb.TrendingRequest, model: Recommender, live: LiveCatalog
) -> ItemFilter | None:
    """What a request allows of the items of a model's catalogue, once what it excludes is checked too; None: every
    item."""
    index, excluded, found = live.catalog.index, request.exclude_item_ids, Violations()
    can_exclude = found.passes(_item_indices, "exclude_item_ids", excluded, MAX_EXCLUDED_ITEMS, index)
    if not request.HasField("filter"):
        found.raise_any()
        return None
    allowed = request.filter.allow_item_ids
    # The same list often comes again, and to look up a thousand ids takes as long as a run of the model.
    content = request.filter.SerializeToString() if allowed and not excluded else b""
    kept = live.allow_lists.get(content) if content else None
    if kept is not None:
        return kept
    items = found.check(_item_indices, "filter.allow_item_ids", allowed, MAX_ALLOWED_ITEMS, index)
    if items is not None and can_exclude and allowed and excluded and set(allowed) <= set(excluded):
        found.add("filter.allow_item_ids", "an item that is not in exclude_item_ids", "none")
    tags = {name: getattr(request.filter, name) for name in ("any_tags", "all_tags", "none_tags")}
    for name, of_rule in tags.items():
        found.check(_check_known, f"filter.{name}", of_rule, model)
    if max(map(len, tags.values())) <= MAX_TAGS:
        found.check(_check_tags, tags["any_tags"], tags["all_tags"], tags["none_tags"])
    minimum = request.filter.minimum_score if request.filter.HasField("minimum_score") else None
    if minimum is not None and not math.isfinite(minimum):
        found.add("filter.minimum_score", "a finite number", f"{minimum:g}")
    found.raise_any()
    # In one order and once, so that requests with the same tags share a mask.
    different = {name: tuple(sorted(set(of_rule))) for name, of_rule in tags.items()}
    if not allowed and not any(different.values()) and minimum is None:
        return None
    chosen = items[items > 0] if allowed and items is not None else None
    item_filter = ItemFilter(chosen, **different, minimum_score=minimum)
    if content and chosen is not None:
        live.allow_lists.put(content, item_filter, len(content) + chosen.nbytes)
    return item_filter


def check_tag(field: str, tag: str, model: Recommender) -> None:
    """Raises InvalidRequest for a tag that neither the model directory nor an item of the store has."""
    # Not only a tag that an item of the model has now: a change of the catalogue must not fail requests.
    if tag not in model.own_tags and tag not in model.stored_tags:
        expected = f"one of the {len(model.own_tags)} tags of the model directory, or one of a stored item"
        raise InvalidRequest(field, expected, shown(tag))


def _item_indices(field: str, item_ids: Sequence[str], most: int, index: Mapping[str, int]) -> NDArray[np.int32]:
    """`[n]`: of each id, 0 where the model does not know it."""
    if not item_ids:
        return NO_ITEMS
    check_length(field, item_ids, most)
    # In passes that are not Python's. A list, since protobuf's own takes half as long again. Known ids are valid.
    items = np.fromiter(map(index.get, item_ids[:], repeat(0)), np.int32, len(item_ids))
    if not items.all():
        check_ids(field, item_ids)
    return items


def _check_known(field: str, tags: Sequence[str], model: Recommender) -> None:
    """Raises InvalidRequest for tags that neither the model directory nor an item of the store has."""
    check_length(field, tags, MAX_TAGS)
    found = Violations()
    for at, tag in enumerate(tags):
        found.check(check_tag, f"{field}[{at}]", tag, model)
        if found.is_full:
            break
    found.raise_any()


def _check_tags(any_tags: Sequence[str], all_tags: Sequence[str], none_tags: Sequence[str]) -> None:
    """Raises InvalidRequest for tags that exclude every possible item."""
    none, found = set(none_tags), Violations()
    both = [tag for tag in all_tags if tag in none]
    if both:
        found.add("filter.all_tags", "no tag of filter.none_tags", shown(both[0]))
    if any_tags and none.issuperset(any_tags):
        found.add("filter.any_tags", "a tag that is not in filter.none_tags", "none")
    found.raise_any()


def decode_seen(seen: int, model: Recommender) -> bool | None:
    """Whether items of the history may be answered; None: as the model has it."""
    if seen not in SEEN:
        raise InvalidRequest("seen", f"one of {', '.join(pb.Seen.keys())}", seen)
    allow = seen == pb.SEEN_ALLOW
    return None if seen in (pb.SEEN_UNSPECIFIED, own_seen(model)) else allow


def own_seen(model: Recommender) -> pb.Seen.ValueType:
    """What a model does with items of the history by itself."""
    return pb.SEEN_EXCLUDE if model.info.repeat is None else pb.SEEN_ALLOW

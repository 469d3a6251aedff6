"""The rules after the model that a request asks for, from its message. Each failure is an InvalidRequest."""

from collections import Counter
from collections.abc import Mapping, Sequence

from serve.api.errors import InvalidRequest
from serve.api.filters import check_tag
from serve.api.rules import MAX_BOOSTS, MAX_K, MAX_PINS, MAX_RULE_TAGS, check_id, check_length, shown
from serve.model.filters import ItemFilter
from serve.model.live_catalog import LiveCatalog, Withheld
from serve.model.recommender import Recommender
from serve.model.rules import Applied, Boost, Pin, Rules, Subject
from serve.pb import recommender_pb2 as pb

APPLIED: Mapping[Applied, "pb.AppliedRule.ValueType"] = {
    Applied.BOOST: pb.APPLIED_RULE_BOOST,
    Applied.RERANKER: pb.APPLIED_RULE_RERANKER,
    Applied.DIVERSITY: pb.APPLIED_RULE_DIVERSITY,
    Applied.MAX_PER_TAG: pb.APPLIED_RULE_MAX_PER_TAG,
    Applied.PIN: pb.APPLIED_RULE_PIN,
}
SMALLEST_FACTOR, LARGEST_FACTOR = 0.01, 100.0


def decode_rules(
    request: pb.RecommendRequest,
    k: int,
    model: Recommender,
    live: LiveCatalog,
    item_filter: ItemFilter | None,
    withheld: Withheld | None,
) -> Rules | None:
    """What a request wants to be done after the model.

    Args:
        request: Its other fields are checked already.
        k: Number of items.
        model: The one that answers.
        live: Its catalogue.
        item_filter: Which items the request allows.
        withheld: The items that may not be answered at the time of the request.

    Returns:
        The rules; None: there are none.
    """
    if not request.HasField("rules"):
        return None
    asked = request.rules
    check_length("rules.boosts", asked.boosts, MAX_BOOSTS)
    boosts = [_boost(f"rules.boosts[{at}]", one, model, live) for at, one in enumerate(asked.boosts)]
    # NaN is not in any range.
    if not 0 <= asked.diversity <= 1:
        raise InvalidRequest("rules.diversity", "0 to 1", f"{asked.diversity:g}")
    if not 0 <= asked.max_per_tag <= MAX_K:
        raise InvalidRequest("rules.max_per_tag", f"1 to {MAX_K}, or 0 for any number", asked.max_per_tag)
    check_length("rules.pins", asked.pins, min(k, MAX_PINS))
    pins = [_pin(f"rules.pins[{at}]", one, k, model, live) for at, one in enumerate(asked.pins)]
    _check_pins(pins, live, _Answerable(request, live, item_filter, withheld), asked.max_per_tag)
    tags = {subject.tag for subject in (*(one.subject for one in boosts), *(one.subject for one in pins))} - {""}
    if len(tags) > MAX_RULE_TAGS:
        raise InvalidRequest("rules", f"at most {MAX_RULE_TAGS} different tags in boosts and pins", len(tags))
    rules = Rules(
        tuple(one for one in boosts if one.factor != 1),
        asked.diversity,
        asked.max_per_tag,
        tuple(sorted(pins, key=lambda pin: pin.position)),
    )
    if rules == Rules():
        return None
    if request.new_item_slots:
        raise InvalidRequest("new_item_slots", "0 with rules", request.new_item_slots)
    return rules


def row_count(rules: pb.Rules) -> int:
    """How many rankings of the model the rules of a request need: of all items, of those that are named to be pinned or
    boosted up, and of those of each tag that is.

    >>> row_count(pb.Rules(pins=[pb.Pin(tag="a"), pb.Pin(tag="b"), pb.Pin(item_id="1"), pb.Pin(item_id="2")]))
    4
    """
    subjects: list[pb.Boost | pb.Pin] = [*rules.pins, *(one for one in rules.boosts if one.factor > 1)]
    tags = {one.tag for one in subjects if one.WhichOneof("subject") == "tag"}
    return 1 + len(tags) + any(one.WhichOneof("subject") == "item_id" for one in subjects)


def _subject(field: str, message: pb.Boost | pb.Pin, model: Recommender, live: LiveCatalog) -> Subject:
    kind = message.WhichOneof("subject")
    if kind is None:
        raise InvalidRequest(f"{field}.subject", "item_id or tag", "neither")
    if kind == "tag":
        check_tag(f"{field}.tag", message.tag, model)
        return Subject(tag=message.tag)
    check_id(f"{field}.item_id", message.item_id)
    item = live.catalog.index.get(message.item_id)
    if item is None:
        expected = f"an item of the model {model.info.model_version} or of the store"
        raise InvalidRequest(f"{field}.item_id", expected, shown(message.item_id))
    return Subject(item)


def _boost(field: str, message: pb.Boost, model: Recommender, live: LiveCatalog) -> Boost:
    subject = _subject(field, message, model, live)
    if not SMALLEST_FACTOR <= message.factor <= LARGEST_FACTOR:
        raise InvalidRequest(f"{field}.factor", f"{SMALLEST_FACTOR:g} to {LARGEST_FACTOR:g}", f"{message.factor:g}")
    return Boost(subject, message.factor)


def _pin(field: str, message: pb.Pin, k: int, model: Recommender, live: LiveCatalog) -> Pin:
    subject = _subject(field, message, model, live)
    if not 1 <= message.position <= k:
        raise InvalidRequest(f"{field}.position", f"1 to k, which is {k}", message.position)
    return Pin(subject, message.position)


class _Answerable:
    """Which items a request lets be answered."""

    def __init__(
        self,
        request: pb.RecommendRequest,
        live: LiveCatalog,
        item_filter: ItemFilter | None,
        withheld: Withheld | None,
    ) -> None:
        self.excluded = frozenset(request.exclude_item_ids)
        self.none_tags = frozenset(request.filter.none_tags)
        self._blocked = live.filters.blocked(item_filter)
        self._withheld = withheld

    def contradiction(self, item: int, item_id: str) -> str:
        """What keeps an item from being answered; empty: nothing."""
        if self._withheld is not None and self._withheld.mask[item]:
            return "one that is hidden or not available"
        if self._blocked is not None and self._blocked[item]:
            return "one that filter leaves out"
        return "one of exclude_item_ids" if item_id in self.excluded else ""


def _check_pins(pins: Sequence[Pin], live: LiveCatalog, answerable: _Answerable, max_per_tag: int) -> None:
    """Raises InvalidRequest for pins that contradict each other or the rest of the request."""
    catalog, positions, items, tags = live.catalog, set(), set(), Counter[str]()
    for at, (subject, position) in enumerate(pins):
        field = f"rules.pins[{at}]"
        if position in positions:
            raise InvalidRequest(f"{field}.position", "each position once", position)
        positions.add(position)
        if not subject.item:
            if subject.tag in answerable.none_tags:
                raise InvalidRequest(f"{field}.tag", "no tag of filter.none_tags", repr(subject.tag))
            tags[subject.tag] += 1
            continue
        if subject.item in items:
            raise InvalidRequest(f"{field}.item_id", "each item once", repr(catalog.item_ids[subject.item]))
        items.add(subject.item)
        contradiction = answerable.contradiction(subject.item, catalog.item_ids[subject.item])
        if contradiction:
            raise InvalidRequest(f"{field}.item_id", "an item that may be answered", contradiction)
        tags.update(catalog.genres[subject.item])
    most = tags.most_common(1)
    if max_per_tag and most and most[0][1] > max_per_tag:
        tag, count = most[0]
        raise InvalidRequest("rules.pins", f"at most max_per_tag, {max_per_tag}, of a tag", f"{count} of {tag!r}")

"""The rules after the model that a request asks for, from its message. Each failure is an InvalidRequest."""

from collections import Counter
from collections.abc import Mapping

from serve.api.errors import InvalidRequest, Violations
from serve.api.filters import check_tag
from serve.api.rules import MAX_BOOSTS, MAX_K, MAX_PINS, MAX_RULE_TAGS, check_id, check_length
from serve.model.filters import ItemFilter
from serve.model.live_catalog import LiveCatalog, Withheld
from serve.model.recommender import Recommender
from serve.model.rules import Applied, Boost, Pin, Rules, Subject
from serve.pb import recommender_pb2 as pb
from serve.serving.errors import shown

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
    k: int | None,
    model: Recommender,
    live: LiveCatalog,
    answerable: "Answerable | None",
) -> Rules | None:
    """What a request wants to be done after the model.

    Args:
        request: With rules; its other fields are checked already.
        k: Number of items; None: it is not valid.
        model: The one that answers.
        live: Its catalogue.
        answerable: The items that may be answered; None: what decides that is not valid.

    Returns:
        The rules; None: they change nothing.

    Raises:
        InvalidRequest: The rules break some.
    """
    asked, found = request.rules, Violations()
    boosts, pins = list[Boost](), list[Pin]()
    if found.passes(check_length, "rules.boosts", asked.boosts, MAX_BOOSTS):
        boosts = [one for at, boost in enumerate(asked.boosts) if (one := _boost(at, boost, model, live, found))]
    # NaN is not in any range.
    if not 0 <= asked.diversity <= 1:
        found.add("rules.diversity", "0 to 1", f"{asked.diversity:g}")
    if not 0 <= asked.max_per_tag <= MAX_K:
        found.add("rules.max_per_tag", f"1 to {MAX_K}, or 0 for any number", asked.max_per_tag)
    most_pins = MAX_PINS if k is None else min(k, MAX_PINS)
    if found.passes(check_length, "rules.pins", asked.pins, most_pins):
        pins = _pins(asked, k, model, live, answerable, found)
    tags = {subject.tag for subject in (*(one.subject for one in boosts), *(one.subject for one in pins))} - {""}
    if len(tags) > MAX_RULE_TAGS:
        found.add("rules", f"at most {MAX_RULE_TAGS} different tags in boosts and pins", len(tags))
    rules = Rules(
        tuple(one for one in boosts if one.factor != 1),
        asked.diversity,
        asked.max_per_tag,
        tuple(sorted(pins, key=lambda pin: pin.position)),
    )
    if rules != Rules() and request.new_item_slots:
        found.add("new_item_slots", "0 with rules", request.new_item_slots)
    found.raise_any()
    return None if rules == Rules() else rules


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


def _boost(at: int, message: pb.Boost, model: Recommender, live: LiveCatalog, found: Violations) -> Boost | None:
    """The boost; None: its subject is not valid."""
    field = f"rules.boosts[{at}]"
    subject = found.check(_subject, field, message, model, live)
    if not SMALLEST_FACTOR <= message.factor <= LARGEST_FACTOR:
        found.add(f"{field}.factor", f"{SMALLEST_FACTOR:g} to {LARGEST_FACTOR:g}", f"{message.factor:g}")
    return None if subject is None else Boost(subject, message.factor)


class Answerable:
    """Which items a request lets be answered."""

    def __init__(
        self,
        request: pb.RecommendRequest,
        live: LiveCatalog,
        item_filter: ItemFilter | None,
        withheld: Withheld | None,
    ) -> None:
        self.none_tags = frozenset(request.filter.none_tags)
        self._excluded = frozenset(request.exclude_item_ids)
        self._blocked = live.filters.blocked(item_filter)
        self._withheld = withheld

    def contradiction(self, item: int, item_id: str) -> str:
        """What keeps an item from being answered; empty: nothing."""
        if self._withheld is not None and self._withheld.mask[item]:
            return "one that is hidden or not available"
        if self._blocked is not None and self._blocked[item]:
            return "one that filter leaves out"
        return "one of exclude_item_ids" if item_id in self._excluded else ""


def _pins(
    asked: pb.Rules,
    k: int | None,
    model: Recommender,
    live: LiveCatalog,
    answerable: Answerable | None,
    found: Violations,
) -> list[Pin]:
    """The pins whose subjects are valid. Those that contradict each other or the rest of the request are found."""
    catalog, positions, items, tags, pins = live.catalog, set[int](), set[int](), Counter[str](), list[Pin]()
    for at, message in enumerate(asked.pins):
        field, position = f"rules.pins[{at}]", message.position
        subject = found.check(_subject, field, message, model, live)
        if not 1 <= position <= (MAX_K if k is None else k):
            found.add(f"{field}.position", "1 to k" if k is None else f"1 to k, which is {k}", position)
        elif position in positions:
            found.add(f"{field}.position", "each position once", position)
        positions.add(position)
        if subject is None:
            continue
        pins.append(Pin(subject, position))
        if not subject.item:
            if answerable is not None and subject.tag in answerable.none_tags:
                found.add(f"{field}.tag", "no tag of filter.none_tags", shown(subject.tag))
            tags[subject.tag] += 1
            continue
        item_id = catalog.item_ids[subject.item]
        if subject.item in items:
            found.add(f"{field}.item_id", "each item once", shown(item_id))
            continue
        items.add(subject.item)
        contradiction = "" if answerable is None else answerable.contradiction(subject.item, item_id)
        if contradiction:
            found.add(f"{field}.item_id", "an item that may be answered", contradiction)
        tags.update(catalog.genres[subject.item])
    most = tags.most_common(1)
    if 0 < asked.max_per_tag <= MAX_K and most and most[0][1] > asked.max_per_tag:
        tag, count = most[0]
        found.add("rules.pins", f"at most max_per_tag, {asked.max_per_tag}, of a tag", f"{count} of {shown(tag)}")
    return pins

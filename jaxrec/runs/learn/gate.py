"""Whether a retrained model may replace the one that serves: both rank the same held-out events, new to both."""

import dataclasses
from pathlib import Path

import numpy as np

from jaxrec.data.histories import Histories
from jaxrec.data.prepared import PreparedData
from jaxrec.data.split import Cases
from jaxrec.data.store import read_prepared
from jaxrec.data.trend import DecayedCounts
from jaxrec.errors import DataError
from jaxrec.evaluation.bootstrap import Estimate, bootstrap, resample
from jaxrec.evaluation.metrics import MISS, ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.models.hybrid import Hybrid
from jaxrec.runs.directory import load_supervised, open_run
from jaxrec.runs.policy import load_served


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether the new model is published, and why. NDCG@10 of both models and the difference (new less serving) with
    the 95 % interval by user; None: there was nothing to compare on."""

    accepted: bool
    reason: str
    users: int = 0
    new: float | None = None
    serving: float | None = None
    difference: Estimate | None = None


def compare(serving: Path, candidate: Path, published: Path, margin: float, least_users: int) -> Decision:
    """Compares the run that serves with a run that was trained on more events.

    The cases are the test events of the candidate's data that came after the serving run was published. Neither run was
    trained on them, nor a policy on top of it (which may have seen those that came between the export of the events and
    the copy of the store). Neither chose its mix or its best epoch by them: the candidate did so on validation events.
    Each model is given what its server would have: events on items that it does not know are left out, and a target
    that it does not know is a miss. Requests have no time. Cases without a known item in the history are left out, too.

    Args:
        serving: The folder of the run that serves; a policy in use counts.
        candidate: The folder of the run to publish.
        published: The prepared data with all events until the serving run was published.
        margin: Share of the serving model's NDCG@10 that the lower end of the interval may lie below it.
        least_users: With cases of fewer users the candidate is refused.

    Returns:
        The decision.

    Raises:
        DataError: A run cannot be read, or the data of the candidate does not extend that of the serving run.
    """
    (old_data, old), (data, new) = _loaded(serving), _loaded(candidate)
    known = len(old_data.catalog)
    if not np.array_equal(old_data.catalog.ids.raw_ids, data.catalog.ids.raw_ids[:known]):
        raise DataError(f"{candidate}: its catalogue does not begin with that of {serving}; they cannot be compared")
    cases = new_cases(read_prepared(published), data)
    as_known, cases, ranked = with_known_items(data, cases, old_data)
    if not len(cases):
        return Decision(
            False, "refused: no user has a new held-out event to compare on; with more events there will be"
        )
    of_new = ndcg(_ranks(new, data, cases), 10)
    ranks = np.full(len(cases), MISS)
    if len(ranked):
        places = data.histories.items[cases.rows] <= known
        ranks[places] = _ranks(old, as_known, ranked)
    of_old = ndcg(ranks, 10)
    estimate = bootstrap(of_new - of_old, resample(cases.users))
    users = len(np.unique(cases.users))
    return decide(float(of_new.mean()), float(of_old.mean()), estimate, users, margin, least_users)


def decide(
    new: float, serving: float, difference: Estimate, users: int, margin: float, least_users: int = 1
) -> Decision:
    """Accepts the new model if it is not worse than the serving one by more than the margin, with 97.5 % confidence.

    A model that is proved worse, by however little, is refused: such steps would add up. So is one that nothing was
    compared for: the serving model has no hit, or both rank alike, which makes an interval of width 0.

    Args:
        new: NDCG@10 of the new model.
        serving: NDCG@10 of the model that serves.
        difference: New less serving, paired by case, with its interval by user.
        users: How many users the cases are of.
        margin: Share of `serving`.
        least_users: With fewer users the model is refused.

    Examples:
        >>> decide(0.12, 0.10, Estimate(0.02, 0.01, 0.03), 900, 0.05).accepted
        True
        >>> decide(0.10, 0.10, Estimate(0.0, -0.006, 0.006), 900, 0.05).accepted  # may be worse by more than 0.005
        False
        >>> decide(0.12, 0.10, Estimate(0.02, 0.01, 0.03), 1, 0.05, least_users=100).accepted
        False
    """
    floor, accepted = -margin * serving, False
    if users < least_users:
        why = f"refused: expected at least {least_users} users; with more events there will be"
    elif serving == 0:
        why = "refused: the serving model ranks none of these events among its first 10, so that no loss can be seen"
    elif difference.low == difference.high:
        why = "refused: both models rank these events alike"
    elif difference.high < 0:
        why = "refused: it is worse"
    elif difference.low >= floor:
        accepted, why = True, f"accepted: the lower end is not below {floor:+.4f}, {margin:.0%} of the serving model's"
    else:
        why = f"refused: it may be worse, since the lower end is below {floor:+.4f}; more events narrow the interval"
    reason = (
        f"NDCG@10 on the new held-out events of {users} users: new {new:.4f}, serving {serving:.4f}, difference "
        f"{difference.mean:+.4f} ({difference.low:+.4f} to {difference.high:+.4f}); {why}"
    )
    return Decision(accepted, reason, users, new, serving, difference)


def new_cases(old: PreparedData, data: PreparedData) -> Cases:
    """The test cases of `data` whose event is not in the log of `old`.

    Args:
        old: Prepared data with its log.
        data: What `jaxrec append` made of it.

    Raises:
        DataError: `old` has no log.
    """
    if old.log is None:
        raise DataError(f"{old.folder or 'the prepared data'}: holds no log; prepare again")
    cases, log = data.split.test, old.log
    users = log.users.encode(data.users.raw_ids[cases.users]).astype(np.int64) - 1
    items = log.items.encode(data.catalog.ids.decode(data.histories.items[cases.rows]))
    times = data.histories.times[cases.rows]
    new = np.ones(len(cases), bool)
    for place in np.flatnonzero(users >= 0):
        rows = slice(log.events.offsets[users[place]], log.events.offsets[users[place] + 1])
        same = (log.events.times[rows] == times[place]) & (log.events.items[rows] == items[place])
        new[place] = not same.any()
    return Cases(cases.users[new], cases.rows[new])


def with_known_items(data: PreparedData, cases: Cases, old: PreparedData) -> tuple[PreparedData, Cases, Cases]:
    """The data as a model of `old` sees it.

    Args:
        data: Its catalogue begins with that of `old`.
        cases: Of `data`.
        old: The data of the model.

    Returns:
        `data` with the catalogue of `old` and without events on other items; the cases that have a known item in their
        history; and those of them whose target is known, as cases of the former.
    """
    kept = np.asarray(data.histories.items) <= len(old.catalog)
    before = np.concatenate([[0], np.cumsum(kept)])  # [events + 1] kept events before each row
    starts = data.histories.offsets[cases.users]
    usable = before[cases.rows] > before[starts]
    cases = Cases(cases.users[usable], cases.rows[usable])
    known = kept[cases.rows]
    columns = {name: np.asarray(getattr(data.histories, name))[kept] for name in ("items", "ratings", "times")}
    histories = Histories(before[data.histories.offsets], **columns)
    ranked = Cases(cases.users[known], before[cases.rows[known]])
    return dataclasses.replace(data, catalog=old.catalog, histories=histories), cases, ranked


def _loaded(folder: Path) -> tuple[PreparedData, Hybrid]:
    run = open_run(folder)
    data = run.read_data()
    return data, load_served(run, load_supervised(run, data))


def _ranks(hybrid: Hybrid, data: PreparedData, cases: Cases) -> np.ndarray:
    """[cases] int, without request time."""
    scorer = hybrid_scorer(hybrid, DecayedCounts.of(data))
    return rank_cases(scorer, data, cases, hybrid.lstm.config.max_length, False, hybrid.repeat is None).ranks

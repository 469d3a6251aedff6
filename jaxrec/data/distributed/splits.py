"""The splits of `jaxrec.data.split` where a shard sees only its own users.

What a role depends on is local, except for two things, which come from outside: the cut of the temporal split, and the
items that are in any shard's training part (a case asks for an item that training has seen).
"""

import numpy as np

from jaxrec.config import FilterOn, PrepareConfig, SplitKind
from jaxrec.data.filtering import Fitted, Selection
from jaxrec.data.histories import Block, EventLog
from jaxrec.data.ids import IdMap
from jaxrec.data.split import (
    TEMPORAL_MIN_HISTORY,
    TEST,
    TRAINING,
    VALIDATION,
    Cases,
    Split,
    is_training_of_leave_one_out,
    items_in_training,
    leave_one_out,
    leave_one_out_fitted,
    temporal,
    user_roles,
)


def fitted_events(log: EventLog, config: PrepareConfig, cut: int) -> Fitted:
    """Which events the filter counts. `cut`: seconds, for the temporal split."""

    def all_events(block: Block) -> np.ndarray:
        return np.ones(int(block.lengths.sum()), bool)

    def training_events(block: Block) -> np.ndarray:
        return is_training_of_leave_one_out(block.positions(), block.per_event(block.lengths))

    def events_before_the_cut(block: Block) -> np.ndarray:
        return log.events.times[block.rows] < cut

    if config.split is SplitKind.TEMPORAL:
        return events_before_the_cut
    if config.split is SplitKind.USER_HELD_OUT:
        in_training = user_roles(log.users.raw_ids, config.seed) == TRAINING
        return lambda block: block.per_event(in_training[block.users])
    return training_events if config.filter_on is FilterOn.TRAINING else all_events


def known_items(kept: Selection, users: IdMap, config: PrepareConfig, cut: int, items: int) -> np.ndarray:
    """[items + 1] bool: the items in the training part of these users."""
    found = items_in_training(kept.histories, _train_counts(kept, users, config, cut))
    return np.concatenate([found, np.zeros(items + 1 - len(found), bool)])


def split_of(kept: Selection, users: IdMap, config: PrepareConfig, cut: int, known: np.ndarray | None) -> Split:
    """The split of these users; `known` is that of all shards together, None for leave-one-out."""
    histories = kept.histories
    if known is None:
        if config.filter_on is FilterOn.TRAINING:
            return leave_one_out_fitted(histories, kept.train_counts, kept.last_kept, kept.before_last_kept)
        return leave_one_out(histories)
    train_counts = _train_counts(kept, users, config, cut)
    owners, ends = histories.users(), histories.offsets[1:]
    if config.split is SplitKind.TEMPORAL:
        early = histories.times < cut
        trains = np.repeat(kept.train_counts > 0, histories.lengths())
        held_out = early & trains & (histories.positions() == np.repeat(train_counts, histories.lengths()))
        late = ~early & (histories.positions() >= TEMPORAL_MIN_HISTORY)
        rows = [np.flatnonzero(chosen & known[histories.items]) for chosen in (held_out, late)]
    else:
        roles = user_roles(users.raw_ids, config.seed)
        last = [ends[(roles == role) & (histories.lengths() >= 2)] - 1 for role in (VALIDATION, TEST)]
        rows = [chosen[known[histories.items[chosen]]] for chosen in last]
    validation, test = (Cases(owners[chosen], chosen) for chosen in rows)
    return Split(train_counts, validation, test)


def _train_counts(kept: Selection, users: IdMap, config: PrepareConfig, cut: int) -> np.ndarray:
    """[users] int64. Only for the splits that ask for known items."""
    if config.split is SplitKind.TEMPORAL:
        return temporal(kept.histories, cut, kept.train_counts > 0).train_counts
    return np.where(user_roles(users.raw_ids, config.seed) == TRAINING, kept.histories.lengths(), 0)

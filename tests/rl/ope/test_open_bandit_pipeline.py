"""The same numbers as Open Bandit Pipeline (obp 0.4.1, Saito et al. 2021), where both compute the same thing.

obp wants PyTorch and older packages, so it is no dependency. The first test holds its results on a fixed log; the
second compares on random logs wherever obp can be imported (`pip install --no-deps obp==0.4.1`, and what it asks for).

Not compared: intervals (obp's are percentile bootstraps over rows), self-normalized RIPS and Cascade-DR (obp 0.4.1 has
neither). Its RIPS takes propensities that are cumulated already.
"""

import numpy as np
import pytest

from bench.estimators import ips, switch_doubly_robust
from jaxrec.rl.ope.estimators import doubly_robust, self_normalized_doubly_robust, snips
from jaxrec.rl.ope.weights import importance_weights, slate_weights

ROWS, ACTIONS, SLATES, SLOTS, THRESHOLD = 60, 4, 40, 3, 1.5
Figures = dict[str, float]
Log = dict[str, np.ndarray]

# Of `fixed_logs()`, by obp 0.4.1: InverseProbabilityWeighting, SelfNormalizedInverseProbabilityWeighting, DoublyRobust,
# SelfNormalizedDoublyRobust, SwitchDoublyRobust(tau=1.5), SlateStandardIPS, SlateRewardInteractionIPS.
OBP: Figures = {
    "ipw": 0.7826845891681419,
    "snipw": 0.4586059775294684,
    "dr": 0.41136914799169394,
    "sndr": 0.4528715353018105,
    "switch-dr": 0.49422390870098687,
    "sips": 1.5743154761904763,
    "rips": 1.944061507936508,
}


def fixed_logs() -> tuple[Log, Log]:
    """A log of actions and one of slates, without random numbers."""
    row, action = np.arange(ROWS)[:, None], np.arange(ACTIONS)[None]
    logged = 1.0 + (row * 5 + action * 3) % 7
    new = 1.0 + (row * 2 + action * 5) % 9
    actions = {
        "logged": logged / logged.sum(axis=1, keepdims=True),
        "new": new / new.sum(axis=1, keepdims=True),
        "action": (np.arange(ROWS) ** 2 + np.arange(ROWS) // 7) % ACTIONS,
        "reward": np.arange(ROWS) * 37 % 11 / 10,
        "model": (row * 3 + action * 4) % 10 / 9,
    }
    slate, slot = np.arange(SLATES)[:, None], np.arange(SLOTS)[None]
    slates = {
        "logged": 0.1 + (slate * 7 + slot * 3) % 8 / 10,
        "new": 0.1 + (slate * 3 + slot * 5) % 7 / 10,
        "reward": (slate * 5 + slot * 2) % 6 / 5,
    }
    return actions, slates


def random_logs(seed: int) -> tuple[Log, Log]:
    rng = np.random.default_rng(seed)
    logged, new = rng.dirichlet(np.ones(7), (2, 500))
    actions = {
        "logged": logged,
        "new": new,
        "action": (rng.random((500, 1)) > np.cumsum(logged, axis=1)).sum(axis=1).clip(max=6),
        "reward": rng.normal(size=500),
        "model": rng.normal(size=(500, 7)),
    }
    slates = {name: rng.uniform(0.05, 1.0, (300, 5)) for name in ("logged", "new", "reward")}
    return actions, slates


def ours(actions: Log, slates: Log) -> Figures:
    row, action, reward, model = (
        np.arange(len(actions["action"])),
        actions["action"],
        actions["reward"],
        actions["model"],
    )
    weights = importance_weights(np.log(actions["new"][row, action]), np.log(actions["logged"][row, action]))
    robust = (weights, reward, model[row, action], np.sum(actions["new"] * model, axis=1))
    whole = importance_weights(np.log(slates["new"]).sum(axis=1), np.log(slates["logged"]).sum(axis=1))
    each = slate_weights(np.log(slates["new"]), np.log(slates["logged"]))
    return {
        "ipw": ips(weights, reward).value(),
        "snipw": snips(weights, reward).value(),
        "dr": doubly_robust(*robust).value(),
        "sndr": self_normalized_doubly_robust(*robust).value(),
        "switch-dr": switch_doubly_robust(*robust, THRESHOLD).value(),
        "sips": ips(whole, slates["reward"].sum(axis=1)).value(),
        "rips": ips(each, slates["reward"]).value(),
    }


def theirs(actions: Log, slates: Log) -> Figures:
    from obp import ope

    rows, slots = len(actions["action"]), slates["reward"].shape[1]
    log = {
        "reward": actions["reward"],
        "action": actions["action"],
        "pscore": actions["logged"][np.arange(rows), actions["action"]],
        "action_dist": actions["new"][:, :, None],
        "estimated_rewards_by_reg_model": actions["model"][:, :, None],
        "position": np.zeros(rows, int),
    }
    count = len(slates["reward"])
    slate_log = {
        "slate_id": np.repeat(np.arange(count), slots),
        "position": np.tile(np.arange(slots), count),
        "reward": slates["reward"].ravel(),
    }
    whole = {name: np.repeat(slates[name].prod(axis=1), slots) for name in ("logged", "new")}
    each = {name: np.cumprod(slates[name], axis=1).ravel() for name in ("logged", "new")}
    estimators = (
        ope.InverseProbabilityWeighting(),
        ope.SelfNormalizedInverseProbabilityWeighting(),
        ope.DoublyRobust(),
        ope.SelfNormalizedDoublyRobust(),
        ope.SwitchDoublyRobust(tau=THRESHOLD),
    )
    return {
        **{estimator.estimator_name: float(estimator.estimate_policy_value(**log)) for estimator in estimators},
        "sips": float(
            ope.SlateStandardIPS(len_list=slots).estimate_policy_value(
                **slate_log, pscore=whole["logged"], evaluation_policy_pscore=whole["new"]
            )
        ),
        "rips": float(
            ope.SlateRewardInteractionIPS(len_list=slots).estimate_policy_value(
                **slate_log, pscore_cascade=each["logged"], evaluation_policy_pscore_cascade=each["new"]
            )
        ),
    }


def test_fixed_log_has_the_values_of_obp() -> None:
    assert ours(*fixed_logs()) == pytest.approx(OBP, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_random_logs_have_the_values_of_obp(seed: int) -> None:
    pytest.importorskip("obp", reason="obp is not installed; the constants of a fixed log are tested instead")
    logs = random_logs(seed)
    assert ours(*logs) == pytest.approx(theirs(*logs), abs=1e-6)

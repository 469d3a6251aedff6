"""Real feedback: the estimates on a log that a reader can check by hand."""

import zipfile
from pathlib import Path

import click
import numpy as np
import pytest

from bench.rl_open_bandit import CAMPAIGNS, NAMES, RANDOM, THOMPSON, Log, difference, mean_policy, read_logs, terms_of
from jaxrec.rl.ope.intervals import Interval

# Two items on one position: item 0 was clicked in one of two rows, item 1 in none.
AT_RANDOM = Log(np.array([0, 0, 1, 1]), np.zeros(4, int), np.array([1.0, 0, 0, 0]), np.full(4, 0.5))


def test_a_policys_mean_is_how_often_it_showed_each_item() -> None:
    own = Log(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, 0, 1]), np.zeros(5), np.full(5, 0.5))
    np.testing.assert_allclose(mean_policy(own, THOMPSON, (2, 2)), [[0.75, 0.25], [0, 1]])
    np.testing.assert_allclose(mean_policy(own, RANDOM, (2, 2)), [[0.5, 0.5], [0.5, 0.5]])


def test_estimates_of_a_policy_that_prefers_what_is_clicked() -> None:
    weights, terms = terms_of(AT_RANDOM, np.array([[0.75, 0.25]]))
    np.testing.assert_allclose(weights.value, [1.5, 1.5, 0.5, 0.5])
    for name, of_name in terms.items():
        if "doubly" not in name:
            assert of_name.value() == pytest.approx(0.75 * 0.5), name  # its mean click rate
    always, _ = terms_of(AT_RANDOM, np.array([[1.0, 0.0]]))
    np.testing.assert_allclose(always.value, [2, 2, 0, 0])


def test_the_model_of_a_row_does_not_know_its_click() -> None:
    """One click changes the models of the other half of the rows alone."""
    policy = np.array([[0.75, 0.25]])
    _, before = terms_of(AT_RANDOM._replace(click=np.zeros(4)), policy)
    _, after = terms_of(AT_RANDOM, policy)
    changed = (after["doubly robust"].numerator - before["doubly robust"].numerator)[:, 0]
    assert changed[0] == pytest.approx(1.5)  # the weighted click itself
    assert changed[2] == 0.0
    assert changed[1] != 0.0
    assert changed[3] != 0.0


def test_errors_of_two_logs_add_as_squares() -> None:
    found = difference(Interval(5, 2, 9, 2), Interval(4, 1, 8, 1.5))
    assert found.value == 1
    assert found.low == 1 - 5  # 3 and 4
    assert found.high == 1 + 5  # 4 and 3
    assert found.standard_error == 2.5


def test_logs_out_of_the_package(tmp_path: Path) -> None:
    wheel = tmp_path / "obp.whl"
    with zipfile.ZipFile(wheel, "w") as package:
        for policy in NAMES:
            for campaign in CAMPAIGNS:
                rows = "\n".join([",timestamp,item_id,position,click,propensity_score", "0,now,7,3,1,0.25"])
                package.writestr(f"obp/dataset/obd/{policy}/{campaign}/{campaign}.csv", rows)
    log = read_logs(wheel)[THOMPSON, "men"]
    assert (log.item.tolist(), log.position.tolist(), log.click.tolist(), log.propensity.tolist()) == (
        [7],
        [2],
        [1.0],
        [0.25],
    )


@pytest.mark.parametrize("content", [b"no zip", b""])
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(content)
    with pytest.raises(click.ClickException, match=r"x\.whl: expected the wheel of obp"):
        read_logs(tmp_path / "x.whl")

"""`Run.recommend`: the lists that a server of the exported run gives, for frames and for lists of items."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, RATING, TIME, USER
from jaxrec.errors import DataError
from jaxrec.models.hybrid import Hybrid
from jaxrec.onnx.model_directory import export_model
from jaxrec.runs.directory import Run, open_run
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.recommender import Query, Recommender


@pytest.fixture
def run(
    small_data: PreparedData,
    small_hybrid: Hybrid,
    new_run: Callable[[Path, Hybrid], Path],
    tmp_path: Path,
) -> Run:
    """A run whose models are `small_hybrid`, as if they were read from its folder."""
    run = open_run(new_run(tmp_path, small_hybrid))
    run.__dict__["supervised"] = small_data, small_hybrid
    return run


@pytest.fixture
def histories(small_data: PreparedData) -> pd.DataFrame:
    """All events of 5 users, one of them with an unknown item, and a user of unknown items alone."""
    events = small_data.histories
    rows = slice(0, events.offsets[5])
    frame = pd.DataFrame(
        {
            USER: small_data.users.decode(events.users()[rows] + 1),
            ITEM: small_data.catalog.ids.decode(events.items[rows]),
            RATING: events.ratings[rows],
            TIME: events.times[rows],
        }
    )
    unknown = pd.DataFrame({USER: [3, 99], ITEM: [5, 5], RATING: [4.0, np.nan], TIME: [10**9, 10**9]})
    return pd.concat([frame, unknown], ignore_index=True)


def test_recommended_lists_are_the_served_ones(run: Run, histories: pd.DataFrame, model_directory: Path) -> None:
    queries = [
        Query([Event(str(row.item_id), float(row.rating), int(row.timestamp)) for row in of_user.itertuples()], k=7)
        for _, of_user in histories.groupby(USER, sort=False)
    ]
    answers = Recommender(read_artifact(model_directory), "cpu").recommend(queries)
    found = run.recommend(histories, k=7)
    assert list(found) == ["user_id", "rank", "item_id", "title", "score"]
    assert found["user_id"].unique().tolist() == histories[USER].unique().tolist()
    data, _ = run.supervised
    for (_, of_user), answer in zip(found.groupby(USER, sort=False), answers, strict=True):
        assert of_user["rank"].tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert of_user["item_id"].tolist() == data.catalog.ids.decode(answer.items).tolist()
        assert of_user["title"].tolist() == [data.catalog.titles[item - 1] for item in answer.items]
        np.testing.assert_allclose(of_user["score"], answer.scores, rtol=1e-4, atol=1e-4)


def test_items_of_the_history_are_recommended_again_as_they_are_served(
    repeating_hybrid: Hybrid,
    small_data: PreparedData,
    histories: pd.DataFrame,
    new_run: Callable[[Path, Hybrid], Path],
    tmp_path: Path,
) -> None:
    """Of users with 1 to 60 events: all of a history's items, some of them with several events, and an unknown one."""
    run = open_run(new_run(tmp_path, repeating_hybrid))
    run.__dict__["supervised"] = small_data, repeating_hybrid
    export_model(repeating_hybrid, small_data, tmp_path / "model", training={}, metrics={}, licence="Synthetic.")
    again = histories[histories[USER] == 2].assign(**{TIME: lambda of_user: of_user[TIME] + 10**6})
    alone = histories[histories[USER] == 1].iloc[:1].assign(**{USER: 98})
    histories = pd.concat([histories, again, alone], ignore_index=True).sort_values([USER, TIME], kind="stable")
    queries = [
        Query([Event(str(row.item_id), float(row.rating), int(row.timestamp)) for row in of_user.itertuples()], k=60)
        for _, of_user in histories.groupby(USER, sort=False)
    ]
    answers = Recommender(read_artifact(tmp_path / "model"), "cpu").recommend(queries)
    found = run.recommend(histories, k=60)
    for (_, of_user), answer in zip(found.groupby(USER, sort=False), answers, strict=True):
        assert of_user["item_id"].tolist() == small_data.catalog.ids.decode(answer.items).tolist()
        assert len(of_user) == 60
        np.testing.assert_allclose(of_user["score"], answer.scores, rtol=1e-4, atol=1e-4)


def test_the_order_of_rows_does_not_matter_with_timestamps_and_nothing_is_changed(
    run: Run, histories: pd.DataFrame
) -> None:
    one = histories[histories[USER] == 2].drop_duplicates(TIME)
    before = one.copy()
    shuffled = one.sample(frac=1.0, random_state=0)
    pd.testing.assert_frame_equal(run.recommend(shuffled), run.recommend(one))
    pd.testing.assert_frame_equal(one, before)


def test_a_list_is_one_history_in_its_order(run: Run, histories: pd.DataFrame) -> None:
    items = histories.loc[histories[USER] == 1, ITEM].tolist()
    frame = pd.DataFrame({USER: 1, ITEM: items})
    of_list, of_frame = run.recommend(items, k=60), run.recommend(frame, k=60)
    assert of_list["user_id"].isna().all()
    pd.testing.assert_frame_equal(of_list.drop(columns=USER), of_frame.drop(columns=USER))
    assert len(of_list) == 60 - len(set(items))
    assert set(of_list["item_id"]).isdisjoint(items)
    assert run.recommend(items[::-1])["item_id"].tolist() != run.recommend(items)["item_id"].tolist()


def test_one_user_gets_the_same_alone_as_among_others(run: Run, histories: pd.DataFrame) -> None:
    together = run.recommend(histories)
    alone = run.recommend(histories[histories[USER] == 4])
    assert together.loc[together[USER] == 4, ITEM].tolist() == alone[ITEM].tolist()


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        (pd.DataFrame({"userId": [1], ITEM: [1007]}), "histories lack the column user_id"),
        (pd.DataFrame({USER: [1], ITEM: ["1007"]}), "the column item_id holds .*, expected whole numbers"),
        (pd.DataFrame({USER: [1], ITEM: [1007], TIME: [0.5]}), "the column timestamp holds float64"),
        (pd.DataFrame({USER: [1], ITEM: [1007], RATING: [9.0]}), r"rating 9 is outside 0.5..5"),
        ([], "histories hold no event"),
    ],
)
def test_what_does_not_fit_is_named(run: Run, histories: pd.DataFrame | list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run.recommend(histories)


def test_no_item_is_not_a_number_of_items(run: Run) -> None:
    with pytest.raises(DataError, match="k is 0, expected at least 1"):
        run.recommend([1007], k=0)

"""What the demo shows of one user, on the small exported model; and the log that it writes."""

import json
import shutil
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from jaxrec.data.prepared import PreparedData
from jaxrec.data.reading.movies import read_movies
from jaxrec.data.reading.read import read_ratings
from jaxrec.data.store import write_prepared
from jaxrec.errors import DataError
from jaxrec.runs.demo import (
    ask_server,
    example_user,
    format_answer,
    genre_alignment,
    run_demo,
    served_page,
    write_movielens,
)


def test_genre_alignment_by_hand() -> None:
    preferences = {"Comedy": {"share": 0.6}, "Drama": {"share": 0.8}}
    recommended = [{"genres": ["Comedy"]}, {"genres": ["Comedy", "War"]}]
    alignment = genre_alignment(preferences, recommended)
    assert alignment["shares"] == {
        "Comedy": {"user": 0.6, "recommended": 1.0},
        "Drama": {"user": 0.8, "recommended": 0.0},
        "War": {"user": 0.0, "recommended": 0.5},
    }
    assert alignment["cosine"] == pytest.approx(0.6 * 1.0 / (1.0 * (1.0 + 0.25) ** 0.5))


def test_the_server_answers_for_one_user(small_data: PreparedData, model_directory: Path) -> None:
    user = example_user(small_data)
    answer = ask_server(model_directory, small_data, user)
    first, stop = small_data.histories.offsets[user], small_data.histories.offsets[user + 1]
    assert answer["event_count"] == stop - first
    assert answer["policy"] == "reinforce"
    times = [item["timestamp"] for item in answer["watch_list"]]
    assert times == sorted(small_data.histories.times[first:stop].tolist(), reverse=True)[:10]
    watched = set(small_data.catalog.ids.decode(small_data.histories.items[first:stop]).tolist())
    recommended = [int(item["item_id"]) for item in answer["recommendations"]]
    assert len(set(recommended)) == 10
    assert not watched & set(recommended)
    text = format_answer(answer)
    for item in answer["recommendations"]:
        assert item["title"] in text
        assert item["explanation"] in text


def test_the_page_of_a_demo(small_data: PreparedData, model_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a whole demo"), served_page(tmp_path):
        pass
    write_prepared(small_data, tmp_path / "data")
    shutil.copytree(model_directory, tmp_path / "model")
    for name in ("DEMO.txt", "user.txt"):
        (tmp_path / name).touch()
    with served_page(tmp_path) as address:
        page, user = address.split("#user=")
        with urlopen(page, timeout=30) as answer:
            assert b"<title>jaxrec</title>" in answer.read()
        asked = Request(f"{page}jaxrec.v1.Recommender/ListEvents", json.dumps({"userId": user}).encode())
        asked.add_header("content-type", "application/json")
        with urlopen(asked, timeout=30) as answer:
            assert {event["userId"] for event in json.load(answer)["events"]} == {user}


def test_the_demo_log_is_movielens(tmp_path: Path) -> None:
    write_movielens(tmp_path)
    ratings, scale = read_ratings(tmp_path / "ratings.csv")
    movies = read_movies(tmp_path / "movies.csv")
    assert (len(ratings), ratings["user_id"].nunique(), len(movies)) == (100_004, 671, 9_066)
    assert str(scale) == "0.5..5"
    toy_story = movies[movies["item_id"] == 1].iloc[0]
    assert toy_story["title"] == "Toy Story (1995)"
    assert toy_story["genres"] == "Adventure|Animation|Children|Comedy|Fantasy"
    assert not movies["title"].str.contains(r"^nan$|\(nan\)").any()


def test_the_demo_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(DataError, match="is not replaced, choose another name"):
        run_demo(tmp_path)

"""Reads public benchmark files that hold the order of events but no times, as S3-Rec (CIKM 2020) published them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from jaxrec.data.schema import GENRES, ITEM, TIME, TITLE, USER

ONE_TIME = 1_262_304_000


def read_sequences(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """FOLDER/sequences.txt as a log whose order is that of its rows, and the attributes of its items as genres."""
    lines = (folder / "sequences.txt").read_text("utf-8").splitlines()
    users = [line.split() for line in lines if line.strip()]
    counts = [len(user) - 1 for user in users]
    items = [item for _, *of_user in users for item in of_user]
    log = pd.DataFrame({USER: np.repeat([user[0] for user in users], counts), ITEM: items, TIME: ONE_TIME})
    attributes = json.loads((folder / "item2attributes.json").read_text("utf-8"))
    known = list(dict.fromkeys(items))
    genres = ["|".join(f"a{one}" for one in attributes.get(item, ())) for item in known]
    return log, pd.DataFrame({ITEM: known, TITLE: [f"item {item}" for item in known], GENRES: genres})

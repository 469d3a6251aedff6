"""What a prepared log looks like: `report.json` and one page of plots, `report.png`.

The report describes all events, those held out for validation and test among them: nothing may be fitted to it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxrec.config import RatingScale
from jaxrec.data.histories import Histories, release
from jaxrec.data.prepared import PreparedData
from jaxrec.files import new_file, write_text

REPORT_FILE, PLOTS_FILE = "report.json", "report.png"
CHUNK = 2_000_000  # events in memory at a time; the columns may be mapped files
QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
CURVE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # shares of the items, the most rated first
FINEST_STEPS = 50  # a longer rating scale is shown in 20 steps
DAYS_BY_DAY = 120  # a log that spans more is counted by month


def build_report(data: PreparedData) -> dict[str, Any]:
    """Counts and shares as JSON values; `input` has those of reading (duplicates, bad rows), where they are known.

    An event is tied if its user's event before it has the same timestamp; the tie rate is their share of all events.
    A genre's share is that of the events whose item has it, so the shares sum to more than 1.
    """
    histories = data.histories
    popularity = _item_counts(histories, len(data.catalog))
    over_time = _over_time(histories)
    tied = sum(over_time["tied"])
    return {
        "users": histories.user_count,
        "items": len(data.catalog),
        "events": histories.event_count,
        "first_time": _iso(min(int(times.min()) for _, times in _chunks(histories.times))),
        "last_time": _iso(max(int(times.max()) for _, times in _chunks(histories.times))),
        "rating_scale": str(data.config.rating_scale) if data.config.rating_scale else None,
        "ratings": _rating_counts(histories, data.config.rating_scale),
        "missing_ratings": sum(int(np.isnan(ratings).sum()) for _, ratings in _chunks(histories.ratings)),
        "history_lengths": _length_quantiles(histories.lengths()),
        "history_length_histogram": _length_histogram(histories.lengths()),
        "popularity": _popularity(popularity),
        "genre_shares": _genre_shares(data, popularity),
        "tied_events": tied,
        "tie_rate": tied / histories.event_count,
        "over_time": over_time,
        "input": dict(data.input),
    }


def write_report(data: PreparedData, folder: Path) -> dict[str, Any]:
    """Writes `report.json` and `report.png` into `folder`, and returns the report."""
    report = build_report(data)
    write_text(folder / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    plot_report(report, folder / PLOTS_FILE)
    return report


def plot_report(report: Mapping[str, Any], path: Path) -> None:
    """One page: ratings over time, ties over time, ratings, history lengths, popularity tail, genre shares."""
    figure = Figure(figsize=(15, 8), layout="constrained")
    (time, lengths, popularity), (ties, ratings, genres) = figure.subplots(2, 3)
    over_time = report["over_time"]
    starts = np.array(over_time["starts"], "datetime64[D]")
    events, tied = np.array(over_time["events"]), np.array(over_time["tied"])
    time.plot(starts, events)
    time.set(title="Events over time", ylabel=f"events per {over_time['unit']}")
    ties.plot(starts[events > 0], tied[events > 0] / events[events > 0])
    ties.set(title=f"Events tied with the one before: {report['tie_rate']:.1%}", ylabel="share", ylim=(0, 1))
    histogram = report["history_length_histogram"]
    lengths.bar([str(low) for low in histogram["from"]], histogram["users"])
    lengths.set(title="History lengths", xlabel="events, from ... to below the next", ylabel="users")
    lengths.tick_params("x", rotation=45)
    popularity.plot(CURVE, report["popularity"]["curve"], marker="o")
    popularity.set(title="Popularity tail", xscale="log", xlabel="share of the items", ylabel="share of events")
    popularity.grid(visible=True)
    ratings.bar(list(report["ratings"]), list(report["ratings"].values()))
    ratings.set(title="Ratings" if report["ratings"] else "No ratings", ylabel="events")
    shares = sorted(report["genre_shares"].items(), key=lambda pair: pair[1])[-25:]
    genres.barh([name for name, _ in shares], [share for _, share in shares])
    genres.set(title="Genres" if shares else "No genres", xlabel="share of events")
    genres.tick_params("y", labelsize="small")
    figure.suptitle(f"{report['events']:,} events, {report['users']:,} users, {report['items']:,} items")
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _chunks(column: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The column in pieces of CHUNK rows, each with its first row; pages of mapped files are given back after use."""
    for start in range(0, len(column), CHUNK):
        yield start, np.asarray(column[start : start + CHUNK])
        release(column)


def _item_counts(histories: Histories, items: int) -> np.ndarray:
    """[items] int64: events of the items 1..items."""
    counts = np.zeros(items + 1, np.int64)
    for _, chunk in _chunks(histories.items):
        counts += np.bincount(chunk, minlength=items + 1)
    return counts[1:]


def _rating_counts(histories: Histories, scale: RatingScale | None) -> dict[str, int]:
    """Events by rating, which is rounded to half stars, or to a 20th of a scale of more than FINEST_STEPS of them."""
    if scale is None:
        return {}
    width = scale.maximum - scale.minimum
    step = 0.5 if 2 * width <= FINEST_STEPS else width / 20
    counts = np.zeros(round(width / step) + 1, np.int64)
    for _, ratings in _chunks(histories.ratings):
        steps = np.rint((ratings[~np.isnan(ratings)] - scale.minimum) / step).astype(np.int64)
        counts += np.bincount(steps, minlength=len(counts))
    return {f"{scale.minimum + step * i:g}": int(count) for i, count in enumerate(counts) if count}


def _length_quantiles(lengths: np.ndarray) -> dict[str, float]:
    values = np.quantile(lengths, list(QUANTILES.values()))
    return {**dict(zip(QUANTILES, values.tolist(), strict=True)), "mean": float(lengths.mean())}


def _length_histogram(lengths: np.ndarray) -> dict[str, list[int]]:
    """Users by length, in bins from a power of two to below the next (and one for 0)."""
    bins = np.bincount(np.ceil(np.log2(lengths + 1)).astype(np.int64))
    return {"from": [0, *(2**i for i in range(len(bins) - 1))], "users": bins.tolist()}


def _popularity(counts: np.ndarray) -> dict[str, Any]:
    """The share of events that the most rated items take; a share of the items is rounded up to whole items."""
    cumulative = np.cumsum(np.sort(counts)[::-1]) / counts.sum()
    curve = [float(cumulative[int(np.ceil(round(share * len(counts), 6))) - 1]) for share in CURVE]
    return {
        "top_1_percent": curve[CURVE.index(0.01)],
        "top_10_percent": curve[CURVE.index(0.1)],
        "items_without_events": int(np.count_nonzero(counts == 0)),
        "curve": curve,
    }


def _genre_shares(data: PreparedData, counts: np.ndarray) -> dict[str, float]:
    shares = counts @ data.catalog.genre_matrix()[1:].astype(np.int64) / counts.sum()
    return {genre: float(share) for genre, share in zip(data.catalog.genres, shares, strict=False)}


def _over_time(histories: Histories) -> dict[str, Any]:
    """Events and tied events by month, or by day where the log spans at most DAYS_BY_DAY."""
    first = min(int(times.min()) for _, times in _chunks(histories.times))
    last = max(int(times.max()) for _, times in _chunks(histories.times))
    unit = "day" if last - first <= DAYS_BY_DAY * 86_400 else "month"
    code = {"day": "datetime64[D]", "month": "datetime64[M]"}[unit]
    origin, end = (np.datetime64(time, "s").astype(code) for time in (first, last))
    starts = np.arange(origin, end + 1)
    events, tied = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)
    for start, times in _chunks(histories.times):
        periods = (times.astype("datetime64[s]").astype(code) - origin).astype(np.int64)
        events += np.bincount(periods, minlength=len(starts))
        tied += np.bincount(periods[_tied(histories, start, times)], minlength=len(starts))
    return {"unit": unit, "starts": starts.astype(str).tolist(), "events": events.tolist(), "tied": tied.tolist()}


def _tied(histories: Histories, start: int, times: np.ndarray) -> np.ndarray:
    """[len(times)] bool: whether row `start + i` has the time of the same user's row before."""
    before = times[:1] if start == 0 else histories.times[start - 1 : start]
    tied = np.diff(times, prepend=before) == 0
    low, high = np.searchsorted(histories.offsets, [start, start + len(times)])
    tied[histories.offsets[low:high] - start] = False
    return tied


def _iso(seconds: int) -> str:
    return f"{np.datetime64(seconds, 's')}Z"

"""The log is written by a thread of its own."""

import io
import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from serve.observability.logs import MINUTE_S, MOST_REPEATED, REQUEST_ID, DetachedHandler, JsonFormatter, Repeated

PATIENCE_S = 30.0


class SlowStream(io.StringIO):
    """Of which nobody reads at first."""

    def __init__(self) -> None:
        super().__init__()
        self.is_read = threading.Event()
        self.is_written = threading.Event()

    def write(self, text: str) -> int:
        self.is_written.set()
        assert self.is_read.wait(PATIENCE_S)
        return super().write(text)


def test_a_bad_call_of_the_log_does_not_fail_its_caller(capsys: pytest.CaptureFixture[str]) -> None:
    handler = DetachedHandler(io.StringIO())
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.warning("%d", "no number")
    handler.finish(PATIENCE_S)
    assert "no number" in capsys.readouterr().err


def test_a_log_that_nobody_reads_holds_up_no_call_and_says_what_was_dropped() -> None:
    stream = SlowStream()
    handler = DetachedHandler(stream, most_lines=2)
    handler.setFormatter(JsonFormatter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    before = REQUEST_ID.set("mine")
    try:
        logger.warning("line %d", 0)
        assert stream.is_written.wait(PATIENCE_S)
        for number in range(1, 6):
            logger.warning("line %d", number)
    finally:
        REQUEST_ID.reset(before)
    stream.is_read.set()
    handler.finish(PATIENCE_S)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["message"] for line in lines] == ["line 0", "line 1", "line 2"]
    assert {line["request_id"] for line in lines} == {"mine"}

    handler = DetachedHandler(stream, most_lines=2)
    handler.setFormatter(JsonFormatter())
    stream.is_read.clear()
    stream.is_written.clear()
    handler.handle(logging.makeLogRecord({"msg": "first"}))
    assert stream.is_written.wait(PATIENCE_S)
    for _ in range(4):
        handler.handle(logging.makeLogRecord({"msg": "more"}))
    stream.is_read.set()
    while stream.getvalue().count("more") < 2:
        pass
    handler.handle(logging.makeLogRecord({"msg": "last"}))
    handler.finish(PATIENCE_S)
    messages = [json.loads(line)["message"] for line in stream.getvalue().splitlines()[3:]]
    assert messages == ["first", "more", "more", "last", "2 lines of the log were dropped"]


def test_every_count_of_dropped_lines_is_written_however_often_they_come() -> None:
    stream, rounds = SlowStream(), MOST_REPEATED + 2
    handler = DetachedHandler(stream, most_lines=2)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(Repeated())

    def wait_for_lines(text: str, count: int) -> None:
        end = time.monotonic() + PATIENCE_S
        while stream.getvalue().count(text) < count:
            assert time.monotonic() < end

    for number in range(1, rounds + 1):
        stream.is_read.clear()
        stream.is_written.clear()
        handler.handle(logging.makeLogRecord({"msg": "first", "levelno": logging.INFO}))
        assert stream.is_written.wait(PATIENCE_S)
        for _ in range(5):
            handler.handle(logging.makeLogRecord({"msg": "more", "levelno": logging.INFO}))
        stream.is_read.set()
        wait_for_lines("more", 2 * number)
        handler.handle(logging.makeLogRecord({"msg": "last", "levelno": logging.INFO}))
        wait_for_lines("3 lines of the log were dropped", number)
    handler.finish(PATIENCE_S)


def test_long_lines_of_several_processes_stay_whole() -> None:
    program = (
        "import logging, sys; from serve.observability.logs import JsonFormatter, start_logging\n"
        "start_logging(JsonFormatter(), is_shared=True)\n"
        "for _ in range(100): logging.info(sys.argv[1] * 100_000)"
    )
    reading, writing = os.pipe()
    processes = [subprocess.Popen([sys.executable, "-c", program, letter], stderr=writing) for letter in "ab"]
    os.close(writing)
    with os.fdopen(reading) as log:
        messages = [json.loads(line)["message"] for line in log]
    assert [process.wait(PATIENCE_S) for process in processes] == [0, 0]
    assert sorted(messages) == ["a" * 100_000] * 100 + ["b" * 100_000] * 100


def test_a_failure_that_comes_with_every_call_is_logged_some_times_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    logger = logging.Logger("test")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(caplog.handler, "filters", [Repeated(lambda: now)])

    def fail(divisor: object) -> None:
        try:
            1 / divisor  # type: ignore[operator]
        except Exception as error:
            logger.error("cannot be answered [%d]", now, exc_info=error)

    for _ in range(MOST_REPEATED + 90):
        fail(0)
        logger.info("a call")
    assert caplog.messages.count("cannot be answered [0]") == MOST_REPEATED
    assert caplog.messages.count("a call") == MOST_REPEATED + 90
    # Another failure in the same place is not hidden by it.
    fail("text")
    assert caplog.messages.count("cannot be answered [0]") == MOST_REPEATED + 1
    now = MINUTE_S
    fail(0)
    assert caplog.messages[-1] == "cannot be answered [60] (and 90 times before, left out here)"

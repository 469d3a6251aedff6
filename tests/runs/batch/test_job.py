"""A job: nothing that a worker of an earlier command writes late becomes part of it."""

from pathlib import Path

import pytest

from jaxrec.files import new_file, write_text
from jaxrec.runs.batch.job import open_job


def test_what_is_written_late_is_in_no_later_reading(tmp_path: Path) -> None:
    out, settings = tmp_path / "out", {"k": 3}
    with open_job(out, settings) as job:
        late = job.new_input() / "part-000003.arrow"
    with open_job(out, settings) as job:  # as after a kill
        job.new_input()
        write_text(late, "of the command that was killed")
        assert list(job.input.iterdir()) == []
        job.finish_input({"rows": 1})
        input_, parts = job.input, job.parts
    with open_job(out, settings) as job:
        assert (job.counts(), job.input, job.parts) == ({"rows": 1}, input_, parts)
    with open_job(out, {"k": 4}) as job:
        job.new_input()
        job.finish_input({"rows": 1})
        write_text(parts / "part-00000.parquet", "of another command")
        assert list(job.parts.iterdir()) == []
        job.remove()
    assert list(tmp_path.iterdir()) == []


def test_another_command_that_was_stopped_while_it_began_anew_leaves_no_half_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with open_job(out, {"k": 3}) as job:
        write_text(job.new_input() / "log", "")
        job.finish_input({"rows": 1})

    def stop(folder: Path, **how: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jaxrec.runs.batch.job.shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt), open_job(out, {"k": 4}):
            pass
    with open_job(out, {"k": 3}) as job:
        assert job.counts() is None


def test_a_process_that_enters_during_the_deletion_keeps_its_job(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_job(out, {}) as job:
        job.new_input()
        job.remove()
        with open_job(out, {}) as other, new_file(other.new_input() / "log") as new:
            new.write_text("")
    assert (other.input / "log").is_file()

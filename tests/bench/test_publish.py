"""A page of bench/ is written whole, of one commit without changes, or is left as it is."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from bench import publish, quality
from bench.publish import Page, begin, commit, here, less, origin, read_figures, write_arrays, write_figures

BEFORE = "# What was published before\n"


def git(checkout: Path, *words: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *words], cwd=checkout, check=True, capture_output=True)


def commit_all(checkout: Path) -> str:
    """A commit of all files, in a new process as it were."""
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--allow-empty", "--message", "change")
    here.cache_clear()
    return commit()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with a script and two pages, in place of this one."""
    folder = tmp_path / "checkout"
    (folder / "bench").mkdir(parents=True)
    (folder / "bench/example.py").write_text("seeds = 5\n")
    for name in ("example", "quality"):
        (folder / f"bench/{name}.md").write_text(BEFORE)
    git(folder, "init", "--quiet")
    monkeypatch.setattr(publish, "ROOT", folder)
    monkeypatch.setattr(publish, "PAGES", folder / "bench")
    monkeypatch.setattr(
        "sys.argv",
        [
            "bench",
            "--work",
            "/home/somebody/work",
            "--mount",
            "/home/somebody/pip.conf:/etc/pip.conf",
            "log=/home/somebody/u.data",
        ],
    )
    commit_all(folder)
    yield folder
    here.cache_clear()


def page(work: Path, *, asked: bool = True, lacking: tuple[str, ...] = ()) -> Page:
    return Page("example", "An example", asked, work, lacking)


def published(checkout: Path, name: str = "example") -> str:
    return (checkout / f"bench/{name}.md").read_text()


def test_a_page_is_written_beside_the_work(checkout: Path, tmp_path: Path) -> None:
    page(tmp_path, asked=False).write(["figures"])
    assert (tmp_path / "example.md").read_text().endswith("\nfigures\n")
    assert published(checkout) == BEFORE


def test_without_a_work_folder_it_is_printed(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Page("example", "An example", publish=False).write(["figures"])
    assert "figures" in capsys.readouterr().out
    assert published(checkout) == BEFORE


def test_a_whole_page_is_published_with_command_commit_and_machine(checkout: Path, tmp_path: Path) -> None:
    write_figures(tmp_path / "a.json", {"ndcg": 0.5})
    write_arrays(tmp_path / "b.npz", {"ranks": np.array([1, 2])})
    page(tmp_path).write(["| figures |"], [tmp_path / "a.json", tmp_path / "b.npz"])
    text = published(checkout)
    assert text == (tmp_path / "example.md").read_text()
    assert text.splitlines()[:4] == [
        "# An example",
        "",
        "`python -m bench.example --work FOLDER --mount FILE:/etc/pip.conf log=PATH/u.data`",
        "",
    ]
    assert f"- measured at commit {commit()}\n- {here().machine}\n\n| figures |\n" in text
    assert "somebody" not in text
    assert read_figures(tmp_path / "a.json") == {"ndcg": 0.5}


def test_less_than_the_page_needs_is_refused_before_anything_is_measured(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(
        click.ClickException, match=r"bench/example\.md is left as it is: seeds: 2 of 5; logs: without b"
    ):
        page(tmp_path, lacking=tuple(less(seeds=(2, 5), logs=({"a": 1}, ("a", "b")))))
    page(tmp_path, asked=False, lacking=("seeds: 2 of 5",)).write([])
    assert "- not to be published: seeds: 2 of 5\n" in (tmp_path / "example.md").read_text()


def test_a_missing_result_is_refused(checkout: Path, tmp_path: Path) -> None:
    write_figures(tmp_path / "0.json", 1)
    with pytest.raises(click.ClickException, match=r"1\.json is missing"):
        page(tmp_path).write([], [tmp_path / "0.json", tmp_path / "1.json"])
    assert published(checkout) == BEFORE


@pytest.mark.parametrize("file", ["bench/example.py", "bench/new.py"])
def test_a_dirty_tree_is_refused(file: str, checkout: Path, tmp_path: Path) -> None:
    (checkout / file).write_text("seeds = 1\n")
    here.cache_clear()
    assert commit().endswith("-dirty")
    with pytest.raises(click.ClickException, match="changes that were not committed"):
        page(tmp_path)


def test_pages_that_were_published_just_now_are_no_changes(checkout: Path, tmp_path: Path) -> None:
    (checkout / "bench/quality.md").write_text("new")
    page(tmp_path).write([])
    assert published(checkout) != BEFORE


def test_a_change_while_it_was_measured_is_refused(checkout: Path, tmp_path: Path) -> None:
    measured = page(tmp_path)
    (checkout / "bench/example.py").write_text("seeds = 1\n")
    with pytest.raises(click.ClickException, match=r"the checkout was at .* at the start, and is at .*-dirty"):
        measured.write([])
    assert published(checkout) == BEFORE


def test_results_of_a_dirty_tree_are_refused_after_the_commit(checkout: Path, tmp_path: Path) -> None:
    (checkout / "bench/example.py").write_text("seeds = 1\n")
    here.cache_clear()
    write_figures(tmp_path / "0.json", 1)
    commit_all(checkout)
    with pytest.raises(click.ClickException, match="measured with changes that were not committed"):
        page(tmp_path).write([], [tmp_path / "0.json"])
    assert published(checkout) == BEFORE


def test_results_of_different_commits_are_refused(checkout: Path, tmp_path: Path) -> None:
    first = begin(tmp_path / "begun.json")
    before = commit()
    after = commit_all(checkout)
    assert begin(first) == first  # it stays as it was begun
    write_figures(tmp_path / "0.json", 1)
    commits = ", ".join(sorted([before, after]))
    with pytest.raises(click.ClickException, match=f"the results are of different commits: {commits}"):
        page(tmp_path).write([], [first, tmp_path / "0.json"])
    assert published(checkout) == BEFORE


def test_results_of_one_earlier_commit_are_published_as_such(checkout: Path, tmp_path: Path) -> None:
    write_figures(tmp_path / "0.json", 1)
    before = commit()
    assert commit_all(checkout) != before
    page(tmp_path).write([], [tmp_path / "0.json"])
    assert f"measured at commit {before}\n" in published(checkout)


def test_a_result_that_names_no_commit_is_an_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "old.npz", ranks=np.array([1]))
    with pytest.raises(click.ClickException, match=r"old\.npz does not say at which commit"):
        origin(tmp_path / "old.npz")


def measure_quality(work: Path, name: str, ratings: Path, seed: int, split: str, ties: object) -> Path:
    """In place of a training: one case, whose target is first."""
    arrays = {"popularity": np.array([0, 3, 1]), "users": np.array([0]), "data": "0" * 64}
    arrays |= {"hybrid|False|ranks": np.array([1]), "hybrid|False|top": np.array([[1, 2]])}
    file = work / f"{name}-{split}-{ties}" / f"ranks-{seed}.npz"
    write_arrays(file, arrays)
    begin(quality.begun(file))
    return file


def run_quality(work: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Result:
    monkeypatch.setattr(quality, "measure", measure_quality)
    for name in quality.LOGS:
        (work / "logs" / name).mkdir(parents=True, exist_ok=True)
    (work / "logs/beauty/sequences.txt").touch()
    logs = [f"{name}={work}/logs/{name}" for name in quality.LOGS]
    return CliRunner().invoke(quality.main, ["--work", str(work), *options, *logs])


def test_a_smaller_run_of_the_quality_bench_does_not_replace_its_page(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_quality(tmp_path, monkeypatch, "--publish", "--seeds", "2", "--ties", "file")
    assert (result.exit_code, published(checkout, "quality")) == (1, BEFORE)
    assert "ties: without random; seeds: 2 of 5" in result.output
    result = run_quality(tmp_path, monkeypatch, "--seeds", "2", "--ties", "file")
    assert (result.exit_code, published(checkout, "quality")) == (0, BEFORE)


def test_the_whole_quality_bench_is_published(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_quality(tmp_path, monkeypatch, "--publish").exit_code == 0
    text = published(checkout, "quality")
    sections = 3 * 2 * 2 + 1  # logs, splits, orders of ties; beauty has no times, so that it has one of each
    assert text.count("\n## ") == sections
    assert text.count("[1.0000, 1.0000, 1.0000, 1.0000, 1.0000]") == sections  # five seeds


def test_no_script_writes_a_page_by_itself() -> None:
    scripts = Path(publish.__file__).parent.glob("*.py")
    assert [path.name for path in scripts if '.md")' in path.read_text() and path.name != "publish.py"] == []


def test_what_a_bench_measures_is_of_the_commit_at_its_start(checkout: Path, tmp_path: Path) -> None:
    """Also if nothing is to be published, and nothing was written yet when the checkout changes."""
    before = commit()
    here.cache_clear()
    page(tmp_path, asked=False)
    git(checkout, "commit", "--quiet", "--allow-empty", "--message", "meanwhile")
    assert commit() != before
    assert here().commit == before

"""What docs/releases.md says of versions is true, and `make release` refuses what is no release."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from jaxrec.data.store import PREPARED_SCHEMA_VERSION
from jaxrec.onnx.model_directory import MANIFEST_SCHEMA_VERSION
from jaxrec.rl.served.event_store import STORE_VERSION
from jaxrec.runs.directory import SCHEMA_VERSION as RUN_VERSION
from serve.model.manifest import SCHEMA_VERSION as MANIFEST_VERSION
from serve.stores.postgres.schema import SCHEMA_VERSION as POSTGRES_VERSION
from serve.stores.redis.server import VERSION as REDIS_VERSION
from serve.stores.sqlite.schema import SCHEMA_VERSION as SQLITE_VERSION
from tests.deploy.test_schemas import check_schema

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def test_the_table_of_versions_ends_with_those_of_the_code() -> None:
    page = (ROOT / "docs/releases.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \| (.+) \|$", page, re.MULTILINE)
    written = [MANIFEST_SCHEMA_VERSION, MANIFEST_VERSION, RUN_VERSION, PREPARED_SCHEMA_VERSION]
    stores = [SQLITE_VERSION, POSTGRES_VERSION, int(REDIS_VERSION)]
    assert rows[-1] == (VERSION, " | ".join(str(one) for one in [*written, *stores]))
    assert MANIFEST_SCHEMA_VERSION == MANIFEST_VERSION  # what is exported can be served
    assert STORE_VERSION == SQLITE_VERSION  # what is served can be learned from


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of version 1.2.3 that may be released; its tools write their calls to `calls` beside it.

    AT_TESTS is a command that runs with the tests.
    """
    folder = tmp_path / "checkout"
    (folder / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/release", folder / ".ci")
    (folder / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (folder / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 1.2.3 (2026-12-01)\n\n- New.\n")
    targets = ".PHONY: check baseline\ncheck:\n\t@echo check >> ../calls\n"
    targets += "baseline:\n\t@echo baseline >> ../calls; cp contract baseline\n"
    (folder / "Makefile").write_text(targets)
    (folder / "contract").write_text("new")
    (folder / "baseline").write_text("new")
    (folder / ".gitignore").write_text("/.venv/\n/dist/\n")
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\nset -e\necho "$2" >> ../calls\n'
        'if [ "$2" = pytest ]; then sh -c "${AT_TESTS:-true}"; fi\n'
        'if [ "$2" = build ]; then mkdir dist && touch dist/one.whl; fi\n'
    )
    python.chmod(0o755)
    git(folder, "init", "--quiet")
    git(folder, "config", "user.name", "test")
    git(folder, "config", "user.email", "test@example.org")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "version 1.2.3")
    return folder


def release(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    command = ["bash", ".ci/release"]
    return subprocess.run(command, cwd=checkout, check=False, capture_output=True, text=True, env=environment)


def calls(checkout: Path) -> list[str]:
    path = checkout.parent / "calls"
    return path.read_text("utf-8").split() if path.exists() else []


def tags(checkout: Path) -> str:
    return subprocess.run(["git", "tag"], cwd=checkout, check=True, capture_output=True, text=True).stdout


def test_a_release_is_checked_tested_built_and_tagged(checkout: Path) -> None:
    ended = release(checkout)
    assert ended.returncode == 0, ended.stderr
    assert calls(checkout) == ["check", "baseline", "pytest", "build", "twine"]
    assert tags(checkout) == "v1.2.3\n"


@pytest.mark.parametrize("failing", ["check", "pytest", "build", "twine"])
def test_nothing_is_tagged_after_a_step_that_fails(checkout: Path, failing: str) -> None:
    if failing == "check":
        (checkout / "Makefile").write_text("check:\n\t@echo check >> ../calls; exit 7\n")
        git(checkout, "commit", "--all", "--quiet", "--message", "a check that fails")
    else:
        python = checkout / ".venv/bin/python"
        python.write_text(f'{python.read_text()}[ "$2" != {failing} ]\n')
    ended = release(checkout)
    assert ended.returncode != 0
    assert calls(checkout)[-1] == failing
    assert tags(checkout) == ""


def test_nothing_is_tagged_when_the_tests_change_the_checkout(checkout: Path) -> None:
    ended = release(checkout, AT_TESTS="echo more >> contract")
    assert ended.returncode == 1
    assert "the tests or the build changed files" in ended.stderr
    assert tags(checkout) == ""


def test_a_release_that_is_tried_with_some_tests_is_not_tagged(checkout: Path) -> None:
    ended = release(checkout, RELEASE_TESTS="tests/test_docs.py")
    assert ended.returncode == 0, ended.stderr
    assert calls(checkout)[-1] == "twine"
    assert "v1.2.3 is not tagged" in ended.stdout
    assert tags(checkout) == ""


def test_a_baseline_of_another_contract_is_refused_before_the_tests(checkout: Path) -> None:
    (checkout / "contract").write_text("newer")
    git(checkout, "commit", "--all", "--quiet", "--message", "a newer contract")
    ended = release(checkout)
    assert ended.returncode == 1
    assert "proto/baseline.binpb is not that of this contract" in ended.stderr
    assert calls(checkout) == ["check", "baseline"]


def refused(checkout: Path, reason: str) -> None:
    """It is refused before anything is run."""
    ended = release(checkout)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert reason in ended.stderr
    assert calls(checkout) == []


def test_a_changed_checkout_is_not_released(checkout: Path) -> None:
    (checkout / "more.py").write_text("")
    refused(checkout, "not committed")


def test_a_head_without_a_branch_is_not_released(checkout: Path) -> None:
    git(checkout, "checkout", "--quiet", "--detach")
    refused(checkout, "HEAD is not on a branch")


def test_a_version_is_not_released_twice(checkout: Path) -> None:
    git(checkout, "tag", "v1.2.3")
    refused(checkout, "the tag v1.2.3 is there already")


@pytest.mark.parametrize("heading", ["## Unreleased", "## 1.2.30", "## 1x2x3"])
def test_a_version_that_is_not_in_the_changelog_is_not_released(checkout: Path, heading: str) -> None:
    (checkout / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
    git(checkout, "commit", "--all", "--quiet", "--message", "changelog")
    refused(checkout, "CHANGELOG.md has no heading '## 1.2.3'")


def test_a_release_leaves_no_entry_unreleased(checkout: Path) -> None:
    (checkout / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n- Newer.\n\n## 1.2.3\n\n- New.\n")
    git(checkout, "commit", "--all", "--quiet", "--message", "changelog")
    refused(checkout, "CHANGELOG.md has entries under '## Unreleased'")


@pytest.mark.parametrize("name", ["bug.yml", "wish.yml"])
def test_forms_for_issues_keep_the_schema_of_github(name: str) -> None:
    ended = check_schema("github-issue-forms", ROOT / ".github/ISSUE_TEMPLATE" / name)
    assert ended.returncode == 0, ended.stdout


def test_the_hooks_before_a_commit_are_the_checks_of_make_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert [one["repo"] for one in hooks] == ["local"]
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in hooks[0]["hooks"]]
    rule = re.search(r"^check: .*(protos)\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert rule is not None
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in rule[2].splitlines()]
    checks = [command.replace(" --check", "").removesuffix(" .") for command in commands]
    assert sorted(entries) == sorted([*checks, f"make {rule[1]}"])

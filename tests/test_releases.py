"""What docs/releases.md says of versions is true, and `make release` refuses what is no release."""

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
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of version 1.2.3 that may be released."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/release", tmp_path / ".ci")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.3 (2026-12-01)\n")
    (tmp_path / "Makefile").write_text("check:\n\t@echo checked; exit 7\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "version 1.2.3")
    return tmp_path


def release(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", ".ci/release"], cwd=checkout, check=False, capture_output=True, text=True)


def test_a_release_is_checked_before_anything_is_built_or_tagged(checkout: Path) -> None:
    ended = release(checkout)
    assert ended.returncode != 0
    assert "checked" in ended.stdout
    tags = subprocess.run(["git", "tag"], cwd=checkout, check=True, capture_output=True, text=True).stdout
    assert tags == ""
    assert not (checkout / "dist").exists()


def test_a_changed_checkout_is_not_released(checkout: Path) -> None:
    (checkout / "more.py").write_text("")
    ended = release(checkout)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "not committed" in ended.stderr


def test_a_version_is_not_released_twice(checkout: Path) -> None:
    git(checkout, "tag", "v1.2.3")
    ended = release(checkout)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "the tag v1.2.3 is there already" in ended.stderr


@pytest.mark.parametrize("heading", ["## Unreleased", "## 1.2.30", "## 1x2x3"])
def test_a_version_that_is_not_in_the_changelog_is_not_released(checkout: Path, heading: str) -> None:
    (checkout / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
    git(checkout, "commit", "--all", "--quiet", "--message", "changelog")
    ended = release(checkout)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "CHANGELOG.md has no heading '## 1.2.3'" in ended.stderr


@pytest.mark.parametrize("name", ["bug.yml", "wish.yml"])
def test_forms_for_issues_keep_the_schema_of_github(name: str) -> None:
    ended = check_schema("github-issue-forms", ROOT / ".github/ISSUE_TEMPLATE" / name)
    assert ended.returncode == 0, ended.stdout


def test_the_hooks_before_a_commit_are_the_checks_of_make_check() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert [one["repo"] for one in hooks] == ["local"]  # nothing is downloaded
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in hooks[0]["hooks"]]
    rule = re.search(r"^check: .*(protos)\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert rule is not None
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in rule[2].splitlines()]
    checks = [command.replace(" --check", "").removesuffix(" .") for command in commands]
    assert sorted(entries) == sorted([*checks, f"make {rule[1]}"])

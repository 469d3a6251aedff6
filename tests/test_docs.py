"""The documentation is compared with what it speaks of: files, commands, Python names, and measured figures.

`make docs` builds the site and checks the links within it; nothing here needs MkDocs.
"""

import ast
import contextlib
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from jaxrec.cli.main import main as jaxrec_main
from serve.cli.main import main as serve_main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
QUALITY, PEERS, LATENCY = (ROOT / "bench" / name for name in ("quality.md", "quality_peers.md", "latency.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = {"jaxrec": jaxrec_main, "python -m serve": serve_main}

FENCE = re.compile(r"^(\s*)```(\w*)[^\n]*\n(.*?)^\1```\s*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#[^)\s]*)?\)")
PATH = re.compile(r"(?<![\w/.-])(?:jaxrec|serve|tests|bench|proto|examples)/[\w./-]*\w/?")
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
INLINE = re.compile(r"`((?:jaxrec|python -m serve) [^`]+)`")
FIGURES = re.compile(r"<!-- figures: (.+?) -->\n\n?(.*?)\n\n", re.DOTALL)
NO_FIGURES = "none"  # in place of a page: the numbers of a table are not measured
TABLE = re.compile(r"^(?:\|.*\n)+", re.MULTILINE)
UNREAD = re.compile(r"`[^`]*`|\]\([^)]*\)")  # code and targets of links, whose digits are no figures
MEASURED = re.compile(
    r"(?<![\w.,-])(?:\d[\d,]*\.\d+|\d[\d,]*(?= (?:MB|GB|s|ms|µs|seconds|minutes|times|requests|%)(?!\w)))"
)
NUMBER = re.compile(r"\d(?:[\d,]*\d)?(?:\.\d+)?")

# The columns of README's table of quality are sections of bench/quality.md, its rows of jaxrec the rows of "hybrid".
SECTIONS = {
    "ML-100K, leave-one-out": "ml-100k-leave-one-out-file",
    "ML-100K, by time": "ml-100k-temporal-file",
    "ml-latest-small, leave-one-out": "ml-latest-small-leave-one-out-file",
    "ml-latest-small, by time": "ml-latest-small-temporal-file",
}
REQUEST_TIME = {"jaxrec, without request time": "no", "jaxrec, with request time": "yes"}
# The rows of README's table of latency, as bench/latency.md calls them.
SERVERS = {
    "empty call to jaxrec's server": "echo, loop",
    "jaxrec, stored user": "ours, stored user",
    "jaxrec, stored user, reranker": "ours, stored user, reranker",
    "jaxrec, stored user, fast front": "ours, fast front, stored user",
    "jaxrec, stored user, fast front behind nginx": "ours, fast front, stored user, nginx",
    "jaxrec, history sent along": "ours, inline history",
    "Triton, features ready": "Triton",
    "MLServer, features ready": "MLServer",
    "FastAPI with JSON, features ready": "FastAPI, JSON",
}

Cells = dict[tuple[str, str], str]


def name_of(path: object) -> str:
    """What a test is called after: the page, or the text itself."""
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    return [code for _, name, code in FENCE.findall(page.read_text("utf-8")) if name == language]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def rows_of(text: str) -> Iterator[list[str]]:
    """The rows of all Markdown tables in a text, their headers among them, without emphasis."""
    for line in text.splitlines():
        if line.startswith("|") and not set(line) <= set("|-: "):
            yield [cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")]


def table(page: Path, heading: str) -> Cells:
    """The first table under `## heading`, by row and column."""
    section = page.read_text("utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    header, *rows = rows_of(section)
    return {(row[0], name): cell for row in rows for name, cell in zip(header[1:], row[1:], strict=True)}


README_QUALITY, README_LATENCY = table(README, "Quality"), table(README, "Latency")


def measured_quality(row: str, column: str) -> str:
    """`NDCG@10 / HR@10` as a page of bench/ has it. Raises LookupError where none has."""
    if row in REQUEST_TIME:
        section = QUALITY.read_text("utf-8").split(f"## {SECTIONS[column]}\n", 1)[1].split("\n## ", 1)[0]
        found = next(cells for cells in rows_of(section) if cells[:2] == ["hybrid", REQUEST_TIME[row]])
        return f"{found[2].split()[0]} / {found[3].split()[0]}"
    header, *rows = rows_of(PEERS.read_text("utf-8"))
    return {cells[0]: cells for cells in rows}[row][header.index(column)]


def measured_latency(row: str, column: str) -> str:
    """A cell of README's table of latency as bench/latency.md has it. Raises LookupError where it has none."""
    at = {
        int(cells[0]): [cell.split()[0] for cell in cells[2:]]
        for cells in rows_of(LATENCY.read_text("utf-8"))
        if cells[0].isdecimal() and cells[1] == SERVERS[row]
    }
    return {
        "p50 ms at concurrency 1": at[1][0],
        "requests/s at 1 / 8 / 32": " / ".join(at[concurrency][2] for concurrency in (1, 8, 32)),
        "CPU ms per request at 32": at[32][3],
    }[column]


def figures_of(page: Path, sources: list[str]) -> set[str]:
    """All numbers of the pages that `page` cites, as they are written there."""
    return {figure for source in sources for figure in NUMBER.findall((page.parent / source).read_text("utf-8"))}


def commands(page: Path) -> list[str]:
    """The commands of this project in the shell blocks of a page, whole lines without comments."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = (re.search(r"(?:^|\s)((?:jaxrec|python -m serve) .*)", line.split("  #")[0]) for line in lines)
    return [match[1].strip() for match in found if match]


def resolve(line: str) -> tuple[click.Command, click.Context, list[str]]:
    """The click command that a line calls, and the rest of the line. Raises click.UsageError where there is none."""
    program = next(name for name in PROGRAMS if line.startswith(f"{name} "))
    command: click.Command = PROGRAMS[program]
    context, rest = click.Context(command, info_name=program), shlex.split(line.removeprefix(program))
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        if found is None:
            raise click.UsageError(f"there is no command {rest[0]!r}", context)
        command, context, rest = found, click.Context(found, context, rest[0]), rest[1:]
    return command, context, rest


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Parses a command as click does, but for files, which need not exist. Raises click.UsageError."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, parameter, context: value)

    def parse_line(line: str) -> None:
        command, context, rest = resolve(line)
        with contextlib.suppress(click.exceptions.Exit):  # of --help
            command.make_context(context.info_name, rest, parent=context.parent)

    return parse_line


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page: Path) -> None:
    targets = {target for target in LINK.findall(prose(page)) if target and "://" not in target}
    assert [target for target in sorted(targets) if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    assert [path for path in PATH.findall(page.read_text("utf-8")) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs/reference").glob("*.md")), ids=name_of)
def test_modules_of_the_reference_exist(page: Path) -> None:
    modules = DIRECTIVE.findall(page.read_text("utf-8"))
    files = {name: ROOT / name.replace(".", "/") for name in modules}
    assert [name for name, path in files.items() if not (path.is_dir() or path.with_suffix(".py").is_file())] == []


@pytest.mark.parametrize(("row", "column"), README_QUALITY, ids=name_of)
def test_quality_is_as_measured(row: str, column: str) -> None:
    assert README_QUALITY[row, column] == measured_quality(row, column)


@pytest.mark.parametrize(("row", "column"), README_LATENCY, ids=name_of)
def test_latency_is_as_measured(row: str, column: str) -> None:
    assert README_LATENCY[row, column] == measured_latency(row, column)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_figures_with_a_source_are_found_there(page: Path) -> None:
    for sources, text in FIGURES.findall(page.read_text("utf-8") + "\n\n"):
        if sources != NO_FIGURES:
            assert [figure for figure in NUMBER.findall(text) if figure not in figures_of(page, sources.split())] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_with_numbers_cite_a_page_of_bench_or_say_that_nothing_is_measured(page: Path) -> None:
    text = prose(page) + "\n\n"
    known = {block.partition("\n\n")[0].rstrip("\n") for _, block in FIGURES.findall(text)}
    tables = [found.rstrip("\n") for found in TABLE.findall(text) if re.search(r"(?<!\w)\d", UNREAD.sub("", found))]
    assert [found for found in tables if found not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_figures_in_a_sentence_that_cites_a_page_of_bench_are_found_there(page: Path) -> None:
    for sentence in re.split(r"(?<=[.:!?])\s+|\n\s*\n|\n(?=- )", TABLE.sub("", prose(page))):
        sources = [link for link in LINK.findall(sentence) if (page.parent / link).resolve().parent == ROOT / "bench"]
        figures = MEASURED.findall(UNREAD.sub("", sentence)) if sources else []
        assert [figure for figure in figures if figure not in figures_of(page, sources)] == [], sentence


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_blocks_are_complete(page: Path, parse: Callable[[str], None]) -> None:
    for line in commands(page):
        parse(line)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_sentences_have_their_options(page: Path, parse: Callable[[str], None]) -> None:
    for line in INLINE.findall(prose(page)):
        with contextlib.suppress(click.MissingParameter, click.exceptions.NoArgsIsHelpError):
            parse(line)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_name_what_exists(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("jaxrec", "serve"):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], node.module
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jaxrec":
                assert hasattr(importlib.import_module("jaxrec"), node.attr), f"jaxrec.{node.attr}"


def test_what_scaling_computes_is_what_it_shows() -> None:
    shown = 0
    for what, *cells in rows_of((ROOT / "docs/scaling.md").read_text("utf-8")):
        if len(cells) == 2 and re.fullmatch(r"`[\d\s.e*/+()-]+`", cells[0]):
            figure = NUMBER.match(cells[1])
            assert figure, what
            digits = len(figure[0].partition(".")[2])
            assert f"{eval(cells[0].strip('`')):,.{digits}f}" == figure[0], what
            shown += 1
    assert shown > 30

"""Adds files that lie outside docs/ to the site: README, the changelog, the contract, and the pages of bench/.

So each of them has one place in git. Links to them are written as links between the files of the repository. The hook
turns them into links within the site, which MkDocs checks like all others.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ADDED = {
    "README.md": "quickstart.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
    "proto/jaxrec/v1/recommender.proto": "recommender.proto",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of ADDED, and every page and picture of bench/ as benchmarks/NAME."""
    root = Path(config.config_file_path).parent
    bench = sorted(path for path in (root / "bench").iterdir() if path.suffix in (".md", ".svg"))
    added = {root / path: name for path, name in ADDED.items()} | {path: f"benchmarks/{path.name}" for path in bench}
    for path, name in added.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links within the site."""
    up = "" if page.file.src_uri in ADDED.values() else "../"
    links = {f"{up}{path}": name for path, name in ADDED.items()} | {f"{up}bench/": "benchmarks/", f"{up}docs/": ""}
    for before, after in links.items():
        markdown = markdown.replace(f"]({before}", f"]({after}")
    return markdown

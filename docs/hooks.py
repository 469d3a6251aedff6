"""Adds the pages of bench/ to the site under benchmarks/, so that the measured figures have one place in git.

The site is built from docs/; bench/*.md and the pictures that they show lie beside the scripts that write them. MkDocs
checks the links of these pages as it does those of docs/.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

SUFFIXES = (".md", ".svg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds every page and picture of bench/ as benchmarks/NAME."""
    bench = Path(config.config_file_path).parent / "bench"
    for path in sorted(path for path in bench.iterdir() if path.suffix in SUFFIXES):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links to ../bench/, which hold where docs/ is read as files, into links within the site."""
    return markdown.replace("](../bench/", "](benchmarks/")

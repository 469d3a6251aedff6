"""`python -m serve`."""

from serve.cli import main

main(prog_name="python -m serve")

"""Runs every fault of bench/faults.md, one after the other, and prints what came of each.

    python bench/make_model.py --items 10000 --seed 1 --out runs/fault-a
    python bench/make_model.py --items 10000 --seed 2 --out runs/fault-b
    python -m bench.faults runs/fault-a runs/fault-b --minutes 60

Needs h2load (Debian's nghttp2-client), nginx with the extra fast, postgresql and redis-server, and the rights to mount;
what is missing is said.
"""

import subprocess
import sys
from pathlib import Path

import click

from bench.publish import here

CONNECTIONS = (4, 16, 64)


@click.command(context_settings={"show_default": True})
@click.argument("model_a", type=click.Path(exists=True, path_type=Path))
@click.argument("model_b", type=click.Path(exists=True, path_type=Path))
@click.option("--kills", type=click.IntRange(1), default=1000)
@click.option("--reloads", type=click.IntRange(3), default=200)
@click.option("--requests", type=click.IntRange(1), default=200_000, help="Hostile ones.")
@click.option("--seconds", type=click.FloatRange(1), default=60.0, help="Of overload.")
@click.option("--minutes", type=click.FloatRange(0.1), default=60.0, help="Of soak.")
def main(model_a: Path, model_b: Path, kills: int, reloads: int, requests: int, seconds: float, minutes: float) -> None:
    """Run all faults on two models that answer differently; ends with 1 when one of them shows a flaw."""
    over_fronts = {
        "reloads": ["fault_reload", str(model_a), str(model_b), "--reloads", str(reloads)],
        "hostile requests": ["fault_hostile", str(model_a), "--requests", str(requests)],
        **{
            f"overload, {connections} connections": [
                *("fault_overload", str(model_a), "--seconds", str(seconds), "--connections", str(connections))
            ]
            for connections in CONNECTIONS
        },
        "store": ["fault_store", str(model_a)],
        "soak": ["fault_soak", str(model_a), "--minutes", str(minutes)],
    }
    commands = {
        "kill -9": ["fault_kill", "--kills", str(kills)],
        "hostile requests over HTTP": ["fault_hostile", str(model_a), "--http", "--requests", str(requests)],
        "hostile requests over TLS": ["fault_hostile", str(model_a), "--http", "--tls", "--requests", str(requests)],
        **over_fronts,
        **{f"{name}, fast front behind nginx": [*command, "--fast"] for name, command in over_fronts.items()},
    }
    click.echo(f"At commit {here().commit}, {here().machine}.")
    flawed = []
    for name, (module, *arguments) in commands.items():
        click.echo(f"\n{name}: python -m bench.{module} {' '.join(arguments)}")
        command = [sys.executable, "-m", f"bench.{module}", *arguments]
        if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode:
            flawed.append(name)
    if flawed:
        raise click.ClickException(f"not as it should be: {', '.join(flawed)}")


if __name__ == "__main__":
    main()

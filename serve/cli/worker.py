"""One process of `python -m serve run --processes N`; its supervisor starts it with the number of an open socket."""

import os
import socket
import sys

from serve.cli.run import serve
from serve.front.channel import Channel
from serve.front.supervised import Supervised


def main(number: int) -> None:
    """Serves until its supervisor ends, or tells it to."""
    # Not for what a re-ranker starts: the supervisor sees the end of this process by it.
    os.set_inheritable(number, False)
    supervised = Supervised(Channel(socket.socket(fileno=number)))
    serve(supervised.settings, supervised)


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""One exported model: its files, graphs, catalogue and answers; no server."""

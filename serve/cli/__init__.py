"""The command line of the server and its tools."""

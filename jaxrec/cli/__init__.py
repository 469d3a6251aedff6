"""The command line: click only; what computes is imported by the command that needs it."""

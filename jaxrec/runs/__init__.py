"""What a command does with the files of a run: read them, call the stages, write the results."""

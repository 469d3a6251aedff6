"""What can be made of a store's log: files of events to train on, and how the arms of an experiment compare."""

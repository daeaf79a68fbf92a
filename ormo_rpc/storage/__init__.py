"""Files of a run: run directory, checkpoints, write-ahead log, summary."""

"""Random faults against a live run, and what has to hold afterwards: ``python -m benchmarks.chaos`` (see `__main__`)."""

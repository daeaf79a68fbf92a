"""Fault injection: a live run under random faults, and the guarantees it has to keep (``python -m tests.chaos``)."""

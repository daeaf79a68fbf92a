"""Loggers: where a run can be watched."""

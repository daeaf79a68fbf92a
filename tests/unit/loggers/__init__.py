"""Tests of loggers and metrics."""

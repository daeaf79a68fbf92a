"""Tests of `runtimes`."""

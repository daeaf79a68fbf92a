"""Tests of several packages together, in this process."""

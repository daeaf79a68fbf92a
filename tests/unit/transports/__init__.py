"""Tests of `transports`."""

"""Tests of `algorithms`."""

"""Tests of `rendezvous`."""

"""Sweeps, in this process."""

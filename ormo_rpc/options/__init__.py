"""Typed options of every part, and their registration."""

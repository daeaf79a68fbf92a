"""Helpers of the tests: reference implementations, contract tables, processes."""

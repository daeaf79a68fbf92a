"""Comparison of runs as a table, pictures and one page: ``python -m ormo_rpc.report RUN_DIRECTORY_OR_SWEEP ...``."""

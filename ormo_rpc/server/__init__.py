"""The parameter server: assignments, validation, algorithm and scheduler in one place."""

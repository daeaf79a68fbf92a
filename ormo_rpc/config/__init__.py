"""The configuration of a run: schema, parsing, saving."""

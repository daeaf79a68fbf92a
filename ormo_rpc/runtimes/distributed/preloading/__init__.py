"""Preloaders: processes with the imports, the data and the model of a run, from which its processes are forked."""

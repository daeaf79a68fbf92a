"""The live runtime: a server process and worker processes on one machine or many."""

"""Transports: how a push and its reply cross between a worker's process and the server's."""

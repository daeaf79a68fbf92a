"""Rendezvous: how a worker finds the server, proves that it knows the secret, and holds its lease."""

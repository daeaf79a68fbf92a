"""Rendezvous: workers find the server, both sides authenticate, and each worker holds a lease for as long as it works.

`listener` is the server's side and `lease` the worker's; `protocol` has the messages and the handshake of both. `secret` is
what they authenticate with, `addresses` has that of the listener and `interfaces` those of this machine. `connecting` opens
connections, and tells why there is none yet.
"""

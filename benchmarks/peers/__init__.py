"""Other people's parameter servers, making the same round trip as ours: the peers of the throughput benchmark.

Each is a script, ``python -m benchmarks.peers.NAME --parameters D --workers K --seconds S``, that prints one measurement as a
line of JSON. They are written from public documentation, and do what a careful user of that system would do: buffers made once
where the system lets you, one lock around the step, and never the live parameters in a reply.
"""

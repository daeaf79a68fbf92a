"""Ray: its asynchronous parameter server, an actor that holds the parameters, and actors that compute gradients.

Runs in an environment of its own (``make bench-ray``), which has Ray, numpy and psutil but not our package. As in Ray's example
the driver waits for any gradient, has the server apply it, and hands what it returns to the worker that computed it; the
vectors go through Ray's shared-memory store and not through the driver. Workers that call the server themselves, without the
driver, were as fast within the noise.
"""

from __future__ import annotations

import importlib.util
import sys

NOT_INSTALLED = 69

if __name__ == "__main__":
    if importlib.util.find_spec("ray") is None:
        print("ray is not installed in this environment: make bench-ray", file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    from benchmarks.peers.ray_driver import main

    main()

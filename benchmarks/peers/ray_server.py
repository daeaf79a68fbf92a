"""(e) Ray: an actor that holds the parameters, tasks that push and pull through Ray's shared-memory store.

Runs in an environment of its own (``make bench-ray``), which has Ray, numpy and psutil but not our package. The driver keeps
one push of each worker on its way, as in Ray's asynchronous parameter server; each worker is an actor, so it is one process
that keeps its gradient.
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

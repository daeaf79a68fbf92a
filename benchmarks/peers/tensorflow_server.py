"""TensorFlow's ParameterServerStrategy: variables on a server, steps that a coordinator schedules on workers.

Runs in an environment of its own (``make bench-tensorflow``), which has TensorFlow and psutil but not our package.
"""

from __future__ import annotations

import importlib.util
import sys

NOT_INSTALLED = 69

if __name__ == "__main__":
    if importlib.util.find_spec("tensorflow") is None:
        print("tensorflow is not installed in this environment: make bench-tensorflow", file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    from benchmarks.peers.tensorflow_driver import main

    main()

#!/usr/bin/env python3
"""Start a run: ``python launch.py --help``."""

from ormo_rpc.main import main

if __name__ == "__main__":
    main()

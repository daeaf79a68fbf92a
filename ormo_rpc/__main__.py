"""``python -m ormo_rpc``: the command ``ormo-rpc``, for torchrun and where it is not on the path."""

from __future__ import annotations

import sys

from ormo_rpc.main import main

if __name__ == "__main__":
    sys.argv[0] = "ormo-rpc"
    main()

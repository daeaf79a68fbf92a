"""The entry of the command line: makes PyTorch lazy before anything imports it, so that wrong words are refused at once."""

from __future__ import annotations

import os

from ormo_rpc.lazy_import import make_lazy


def main() -> None:
    """Run ``launch.py`` with this process's arguments."""
    for number in range(3):  # a closed standard stream would give its number to the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    make_lazy("torch")
    from ormo_rpc import cli

    cli.main()

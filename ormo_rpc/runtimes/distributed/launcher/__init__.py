"""The launcher: starts the processes of a run, restarts those that die, and ends all of them."""

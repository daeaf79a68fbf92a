"""The launcher: starts the processes of a run, replaces those that die, ends all of them."""

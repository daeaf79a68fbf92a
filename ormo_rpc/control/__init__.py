"""The control plane: how a worker that is authenticated joins, opens its data path and leaves."""

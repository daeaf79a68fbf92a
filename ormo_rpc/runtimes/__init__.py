"""Runtimes: live processes, a simulated cluster, or a replay; all drive the same `ParameterServer` and `Worker`."""

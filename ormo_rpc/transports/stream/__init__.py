"""Fixed-size frames on an authenticated TCP connection, with the vectors behind them or in shared memory."""

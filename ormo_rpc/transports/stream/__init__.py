"""Fixed-size frames on a TCP connection, with payloads behind them or in shared memory."""

"""Own loops, apart from their processes."""

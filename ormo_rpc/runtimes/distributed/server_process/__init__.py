"""The server's process."""

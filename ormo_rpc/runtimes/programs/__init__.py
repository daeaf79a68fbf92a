"""The programs that launchers start: children, and preloaders whose forks become children."""

"""The benchmarks, without a process."""

"""Tests that need a GPU: each compares with the CPU, or with plain PyTorch on the GPU."""

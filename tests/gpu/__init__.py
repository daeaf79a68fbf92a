"""What needs a GPU: each test compares with the CPU, or with plain PyTorch on the GPU."""

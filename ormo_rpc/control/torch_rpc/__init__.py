"""The control plane over torch.distributed.rpc: agents, and what a peer may do through them."""

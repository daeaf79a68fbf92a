"""Pushes as calls of torch.distributed.rpc, by an RRef to the server's service."""

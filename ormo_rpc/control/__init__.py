"""The control plane: how a process that is authenticated joins the run, opens its data path and leaves.

`base` has the calls, `messages` their values. Two carriers bring them to the server: `torch_rpc`, by an RRef of
torch.distributed.rpc, and `lines`, on the connection of the lease. `server` decides, the same for both; `joining` is the
worker's side, and `memberships` the worker number of each process.
"""

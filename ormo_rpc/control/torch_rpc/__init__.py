"""The control plane over torch.distributed.rpc: agents, and what a peer may do through them.

The other modules of this package import torch's RPC, which not every build of torch has.
"""

import torch

UNAVAILABLE = "" if hasattr(torch._C, "_rpc_init") else "torch was built without torch.distributed.rpc"  # pyright: ignore[reportPrivateUsage] # as torch.distributed.rpc.is_available does, whose import takes a while
"""The reason why this process can have no agent; empty where it can."""

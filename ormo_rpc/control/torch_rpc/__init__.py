"""The control plane over torch.distributed.rpc: agents, and what a peer may do through them.

The other modules of this package import torch's RPC, which not every build of torch has.
"""

import torch


def unavailable() -> str:
    """Return the reason why this process can have no agent; an empty text where it can."""
    has_rpc = hasattr(torch._C, "_rpc_init")  # pyright: ignore[reportPrivateUsage] # as torch.distributed.rpc.is_available does, whose import takes a while
    return "" if has_rpc else "torch was built without torch.distributed.rpc"

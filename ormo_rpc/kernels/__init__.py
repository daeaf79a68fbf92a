"""The server's steps as single passes over memory: compiled C where there is a compiler, torch in cache-sized chunks elsewhere.

`ormo_rpc.kernels.steps` says what a step is and does it in torch; `ormo_rpc.kernels.compiled` does the same in C, bit for bit.
`ormo_rpc.kernels.threads` divides very long vectors among threads, `ormo_rpc.kernels.pool` lends the buffers that new
parameters are written into. An algorithm takes its steps through the server's `ormo_rpc.kernels.kernel.Kernel`, which knows whose
steps these are and where new vectors come from.
"""

"""The server's steps as single passes over memory: compiled C where there is a compiler, torch in cache-sized chunks elsewhere.

`steps` defines the steps and takes them in torch; `compiled` takes them in C, bit for bit, and `triton_steps` on a GPU;
`threads` divides very long vectors among threads; `pool` lends the buffers that new parameters are written into. An algorithm
takes its steps through its `kernel.Kernel`, which has the implementation of the steps and the source of new vectors.
"""

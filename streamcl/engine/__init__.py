"""How the arithmetic is done. `eager` is the oracle that every other engine must agree with.

- `eager`: START HERE: any model, optimiser, plug-in, by autograd · `choice`: which engine a configuration comes to
- `fused`, `scan`, `passes`, `kernels`: a chunk of the stream in one compiled loop (numba, CPU)
- `device`, `on_device`, `ahead`: a chunk on a GPU, what its steps read gathered ahead · `graph`, `triton_scan` do it
"""

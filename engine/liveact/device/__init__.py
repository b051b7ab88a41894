"""Which devices there are, and the GPU kernels that were packaged for them."""

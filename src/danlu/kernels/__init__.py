"""Native CPU kernels: packed weights, paged attention, a whole step of a model in one call. Optional."""

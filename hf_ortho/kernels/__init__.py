"""Kernels of the activations: pure functions of an input and parameters. ``dispatch`` chooses among them."""

"""Fast evaluation of the activations: pure functions of the input and the parameters."""

"""Read, verify and write checkpoints and adapters with learnable activations, without fitting."""

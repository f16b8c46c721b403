"""Read, verify and write checkpoints and adapters with learnable activations; nothing is fitted here."""

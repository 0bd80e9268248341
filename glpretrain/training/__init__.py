"""The parts of a training step that every method shares: teachers, memories, heads, decoders, the optimizer and the warm start."""

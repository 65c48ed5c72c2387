"""What only a CUDA device can show; needs pytest and nothing of the other tests' tools."""

"""One process of a training run. Knows ranks, never Ray."""

"""Reading a run without training: what it keeps, what it has seen, and pictures of it."""

"""One training step, the state that it updates, and the loop around it."""

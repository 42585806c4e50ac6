"""One network from options to result, for any protocol."""

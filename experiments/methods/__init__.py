"""From a method's name to its perturbations, penalties, loss and options."""

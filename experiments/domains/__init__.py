"""The protocol of domain generalization: settings, data, networks, selection."""

"""One process: files, hosts, signals and the screen."""

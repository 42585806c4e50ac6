"""Experiment modules: each answers one question and runs as `python -m experiments.NAME`."""

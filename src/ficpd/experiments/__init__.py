"""Experiments: configuration, set-up, the runner, comparisons and reports."""

"""Attacks the releases of a run and measures the leak about a record, to check `privacy`."""

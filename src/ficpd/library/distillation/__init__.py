"""Synthetic examples, and one prompt distilled from all prototypes."""

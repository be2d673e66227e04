"""Prompt tuning as an ordinary Flower app."""

"""FICPD's Flower app."""

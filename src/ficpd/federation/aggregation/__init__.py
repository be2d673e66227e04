"""Combines updates at the server: weighted means, robust means, server optimizers."""

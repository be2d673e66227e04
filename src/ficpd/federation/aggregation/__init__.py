"""How a server combines updates: weighted means, robust means, server optimizers."""

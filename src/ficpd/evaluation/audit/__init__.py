"""What an attacker learns about a record from what was released, measured: the promise of `privacy`, checked."""

"""Secure sums: the server adds up masked vectors, and learns only the sum (Bonawitz et al., CCS 2017, eprint 2017/281).

A round has five exchanges. `masks` has the primitives, `member` a client's half, `server` the server's.

    KEYS     each invited client makes keys for this round and signs them
    SHARES   each checks the others' signatures, and sends shares of its secrets, encrypted for each of the others
    VECTOR   each computes its term, charges it, and sends it under its masks
    CONSENT  each signs the list of clients whose vectors arrived
    REVEAL   with enough signatures, each reveals shares: of own masks of present clients, of mask keys of lost ones

A client keeps its secrets of a round in memory. A client that restarts is lost for the round.
"""

KEYS, SHARES, VECTOR, CONSENT, REVEAL = (
    f"secure_sum/{phase}" for phase in ("keys", "shares", "vector", "consent", "reveal")
)
PHASES = (KEYS, SHARES, VECTOR, CONSENT, REVEAL)
SIMULATED = "simulation"
"""The run's id in the signatures and masks of a simulation."""
MASKED = "masked"
"""The array of a masked vector, int64 [N]."""

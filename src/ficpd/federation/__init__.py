"""One round: clients, the wire format, checks, aggregation and the in-process engine."""

"""`ficpd site`: the resident process of one organisation, with its records, backbone, budget and ledger."""

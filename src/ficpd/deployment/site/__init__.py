"""The process of `ficpd site` at one organisation, with its records, backbone, budget and ledger."""

"""Parts that several methods share: clustering, residual prompts, token aggregation."""

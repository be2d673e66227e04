"""Metrics, fairness, personalization levels and the privacy audit."""

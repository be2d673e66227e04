"""Real sites: the coordinator, the site process, Flower, certificates."""

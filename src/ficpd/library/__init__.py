"""The prompt library: saving, loading, adapting, exporting."""

"""The report of a run or a comparison: one HTML file without external parts (`ficpd report`)."""

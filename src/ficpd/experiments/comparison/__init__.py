"""`ficpd compare`: methods on the same records at the same budgets.

```
DIR/compare.toml             the comparison as it was last asked for
DIR/cells/KEY/               the run directory of one run; cells that ask for the very same run share it
DIR/cells/KEY.json           its outcome (`schema.RunOutcome`)
DIR/cells/KEY.log            the output of its process, where it failed
DIR/compare.json             everything, for programs and for `ficpd report` (`schema.ComparisonResult`)
DIR/compare.md               the tables to read
DIR/tables/*.csv, *.tex      the same tables
```
"""

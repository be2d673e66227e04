"""`ficpd compare`: methods on the same records at the same budgets.

```
DIR/compare.toml             the last requested comparison
DIR/cells/KEY/               the run directory of one run; cells with the same run share it
DIR/cells/KEY.json           its outcome (`schema.RunOutcome`)
DIR/cells/KEY.log            the output of its process, if it failed
DIR/compare.json             all results, for programs and for `ficpd report` (`schema.ComparisonResult`)
DIR/compare.md               the tables, for readers
DIR/tables/*.csv, *.tex      the same tables
```
"""

"""`ficpd compare`: methods on the same ground at the same budgets, and what `compare.json` says of them.

A *cell* is one point of the grid: method, task, partition, budget, sweep, seed. A *setting* is partition, budget and sweep
together: all that a researcher fixes before comparing methods. A *condition* is a setting on one task.

```
DIR/compare.toml             the comparison as it was last asked for
DIR/cells/KEY/               the run directory of one run (`rundir`); cells that ask for the very same run share it
DIR/cells/KEY.json           its outcome (`cell.Outcome`): status, figures, curve
DIR/cells/KEY.log            what its process said, where it failed
DIR/compare.json             everything, for programs and for `ficpd report`
DIR/compare.md               the tables to read
DIR/tables/*.csv, *.tex      the same tables
```

`compare.json`, schema 1. Shares (accuracy, F1) are 0..1; `null` is "there is none". Additions keep the number; whatever else
changes raises it.

```
schema        1
ficpd         version of the package
name          of the comparison
figure        "own": each client's prompt on its own test records, mean over clients; or "everyone": one prompt on all
reference     the label of the method that the others are tested against
lines         labels of the lines that are always there: zero_shot, local, centralized (without privacy)
test          "t" (scipy.stats.ttest_rel) or "wilcoxon" (scipy.stats.wilcoxon)
confidence    0.95
seeds         [int]
methods       {label: {name: module, line: bool, private: bool, set: {part: {...}}}}, in the order of the tables
tasks         {label: {task: name of the task's module, backbone, metric: METRIC or null if no cell was finished}}
partitions    {label: {...the partition as the recipe has it; {} where the task's own is used}}
budgets       {label: {epsilon, rounds, bytes, queries: each a number or null (not limited by this budget)}}
sweeps        {"part.key": [values]}; sweeps of `method.*` became methods with labels such as "ficpd num_prototypes=5"
cells         [CELL]
conditions    [CONDITION]
settings      [SETTING]
fronts        [FRONT]
targets       [TARGET]
counts        {status: number of cells}

METRIC        {name: "accuracy", scale: 100, digits: 1, unit: " %", less_is_better: false}; shown = scale * value

CELL          method, task, partition, budget: labels
              sweep         {"part.key": value}; {} without sweeps
              seed          int
              status        "done", "refused" (this method cannot do this: why is in `reason`), "failed", "missing"
              reason        null, or why there is no figure
              key           KEY of the run
              figures       {own, everyone: null if the method shares no prompt, worst: the worst client's own}, or null
              at_round      the round that the figures are of: the last, or the last that the budget of bytes or queries
                            allowed; 0 for a method without rounds
              rounds        how many were run
              bytes         {up, down, total}, all clients and rounds up to `at_round`, as encoded
              queries       of all clients up to `at_round`: candidate prompts times records; null if they were not counted
              gradients     how many queries of the whole run asked for a gradient, which no black box answers; or null
              seconds       of training and aggregating up to `at_round`
              epsilon       spent in the whole run; 0 where nothing leaves; null where there is no guarantee
              guarantee     the same in words
              stopped       null, or why the run ended early
              per_client    {client: own figure} at the end of the run
              data          SHA-256 of who holds which records: equal in all cells of one condition and seed
              curve         [POINT], every round that was evaluated, the last one included
POINT         round, own, everyone, bytes_up, bytes_down, queries, seconds; the last four are sums from the first round on.
              The figures before the first round are not measured

CONDITION     task, partition, budget, sweep, and
              methods       {label: SUMMARY}
SUMMARY       n             finished seeds
              mean, sd, interval: [low, high] or null below two seeds (Student's t; over seeds)
              everyone, worst: means over seeds, or null
              bytes, bytes_up, bytes_down, queries, seconds, epsilon: means over seeds, or null
              against       null for the reference, else AGAINST (pairs: seeds)
AGAINST       pairs         how many pairs of finished cells (this method, the reference)
              difference    mean of (this - reference) in the metric's own units; interval: [low, high] or null
              p, p_holm     two-sided; Holm's correction over the methods of this condition or setting, lines left out;
                            null where `why` says why there is no test
              why           null, or why there is none

SETTING       partition, budget, sweep, and
              methods       {label: {rank: mean rank over tasks, 1 the best (ties share; null if a task lacks it),
                                     against: AGAINST over seeds x tasks, or null for the reference}}
              ranked        [task]: those where every ranked method has a figure; lines are not ranked
              friedman      {statistic, p} over `ranked`, or null (fewer than three methods or two tasks)

FRONT         task, partition, cost: "bytes", "epsilon" or "queries", and
              points        [{method, budget, sweep, cost, value, on_front: bool}], means over seeds; who has no such cost
                            (no guarantee, queries not counted) is not there

TARGET        task, partition, budget, sweep, share: 0.9, 0.95 or 0.99 of the centralised line's final figure, and
              target        mean over seeds of the figure to reach (each seed has its own)
              methods       {label: {seeds: [REACHED or null for "not reached", in the order of `of`], of: [seed],
                                     reached: how many, rounds, bytes, bytes_up, bytes_down, queries, seconds: medians
                                     over seeds if all reached it, else null}}
REACHED       {seed, round, bytes, bytes_up, bytes_down, queries, seconds}: the first evaluated round at or beyond the target
```
"""

SCHEMA = 1
"""Of `compare.json` and of `cells/KEY.json`."""

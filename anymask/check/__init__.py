"""`anymask check`: is this machine correct? The oracle's grid, fuzzed masks, and what must be exact, in processes.

`plan` says what is run, `jobs` runs one job, `arguments` is the matrix of arguments, `workers` are the processes,
`tally` counts and `report` writes. Nothing but torch is needed: `python -m anymask.check --quick`.
"""

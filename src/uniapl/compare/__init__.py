"""`uniapl compare`: methods side by side on the embedded task, at equal budget, with intervals.

A *cell* is one training run: a method, its settings, a seed. `plan` says which cells there are, `cell` runs
one, `runner` runs all of them and can be stopped at any time, `statistics` and `report` say what came out.
"""

"""`uniapl compare`: methods on the demo task, at equal budget, with intervals.

A *cell* is one training run: a method, its settings, a seed. `plan` lists the cells, `cell` runs one,
`runner` runs all of them and can be interrupted at any time, `statistics` and `results` evaluate their
outcomes.
"""

"""`uniapl compare`: methods on the data, rewards and suites of any recipe, at equal budget, with intervals.

A *cell* is one training run: a method, its settings, a seed. `plan` turns a recipe and methods into cells,
`runner` runs each in its own process and can be interrupted at any time, `cell` trains and samples,
`measures`, `statistics` and `results` evaluate what the cells wrote.
"""

"""The embedded task: a small world of its own, in which every method can be tried offline in minutes.

A language of some hundred words (`language`), prompts with checkable constraints (`constraints`), an expert
who writes for them in a manner of its own (`writers`), the task made of these (`task`), a base model that
ships with the package and the script that made it (`pretrain`), and what a model's texts are worth
(`measure`). `uniapl demo` is `demo`.
"""

"""The demo tasks, in which every method can be tried offline in minutes.

The task with sentences has a language of about a hundred words (`language`), prompts with checkable
constraints (`constraints`), an expert with its own style (`writers`), a data set made of these (`task`), a
base model that ships with the package (`base`), and measurements of a model's texts (`measure`).

The task with tools has questions, a look-up table and a calculator (`arithmetic`), an expert that uses them
(`solvers`), a data set (`tools`), a smaller base model (`base-tools`), and measurements of a model's
trajectories (`answers`, `measure_tools`).
"""

"""The demo task: a small artificial language in which every method can be tried offline in minutes.

It has a language of about a hundred words (`language`), prompts with checkable constraints (`constraints`),
an expert with its own style (`writers`), a data set made of these (`task`), a base model that ships with the
package (`base`), and measurements of a model's texts (`measure`).
"""

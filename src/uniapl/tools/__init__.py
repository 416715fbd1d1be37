"""Tools that the policy calls in a rollout: functions, and the public methods of environments.

Both are TRL's: a tool is a Python function with type hints and a docstring that describes its arguments, sync
or async; an environment is a class with a `reset` method, of which each rollout has its own instance.
"""

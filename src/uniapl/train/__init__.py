"""The training loop and its parts: the only package that knows accelerate and processes."""

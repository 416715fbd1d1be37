"""The training loop and its parts: the only package that uses accelerate and torch.distributed."""

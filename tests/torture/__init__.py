"""The proof that a run may be killed anywhere and is still right: `make torture`."""

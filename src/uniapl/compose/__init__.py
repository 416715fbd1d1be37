"""`uniapl compose`: base prompts times checkable instructions, for the reward `instruction_following`."""

"""Training on several ranks: the accelerator, FSDP2, and the samplers that only rank 0 calls."""

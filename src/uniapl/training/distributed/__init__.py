"""Several processes: launch, FSDP2, and the sampler that only rank 0 talks to."""

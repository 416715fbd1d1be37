"""The policy: loading, adapters, packed rows, log-probabilities, and its reference."""

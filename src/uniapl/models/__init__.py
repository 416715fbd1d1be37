"""Loading of models, LoRA adapters, packed rows, the policy and its reference."""

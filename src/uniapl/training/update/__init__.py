"""Updates of the policy and of the discriminator."""

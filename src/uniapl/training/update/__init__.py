"""One update of the policy and one of the discriminator."""

"""What tests share: small models, runs, servers on loopback, slow references."""

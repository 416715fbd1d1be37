"""Checkpoints and run directories on disk."""

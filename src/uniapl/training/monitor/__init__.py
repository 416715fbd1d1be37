"""Metrics, health rules, early stopping, console and trackers."""

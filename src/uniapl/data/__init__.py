"""Rows of a data file, the two streams drawn from them, and the micro-batches of a step."""

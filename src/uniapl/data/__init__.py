"""Rows of a data file, the streams of prompts and demonstrations, and the micro-batches of a step."""

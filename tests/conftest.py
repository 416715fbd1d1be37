"""Settings for all tests."""

import os

from hypothesis import settings

# Before torch is loaded: on a busy machine, threads that wait for each other make a test ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test asks the Hub: what is not here is an error at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As the command line does before it loads transformers, which a test file may import first.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Machines are shared and noisy: how long an example takes proves nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

"""Settings for all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is loaded: on a busy machine, threads that wait for each other slow tests down ten times.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test contacts the Hub: a missing file is an error at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As the command line does before it loads transformers, which a test file may import first.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Machines are shared and noisy: the duration of an example proves nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model; files with other needs define their own."""
    from support.tiny import save_model

    return save_model(tmp_path_factory.mktemp("model"))

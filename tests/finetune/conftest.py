"""Fixtures of training."""

import pytest
from training import SHORT

from upcycle.finetune.run import finetune


@pytest.fixture(scope="session")
def repeated(tmp_path_factory):
    """A text that is easily learnt by heart."""
    path = tmp_path_factory.mktemp("repeated") / "repeated.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture
def train(repeated, tmp_path):
    """Trains a folder's model for a few steps, to `tmp_path / "out"` by default."""

    def run(folder, out=None, **settings):
        settings = SHORT | {"data": str(repeated)} | settings
        if "tokens" in settings:
            del settings["steps"]
        return finetune(str(folder), out or tmp_path / "out", **settings)

    return run

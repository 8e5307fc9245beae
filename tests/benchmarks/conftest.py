import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def _frozen_modules():
    """Measurements look for garbage first, each time: not in all that was imported, which takes most of their time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()

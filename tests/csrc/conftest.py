"""A page manager to test."""

import pytest

from tests.csrc.prompts import make


@pytest.fixture
def manager():
    """With a prefix cache, unless a file has one of its own; sound at the end, too."""
    manager = make()
    yield manager
    manager.check()

"""Fixtures of the store's tests."""

from pathlib import Path

import pytest
from store_example import write_file


@pytest.fixture(scope="session")
def store_content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a finished file: writing one waits for the disk, copying it does not."""
    return write_file(tmp_path_factory.mktemp("store") / "run.h5").read_bytes()


@pytest.fixture
def store_path(tmp_path: Path, store_content: bytes) -> Path:
    """The path of a finished file of its own."""
    path = tmp_path / "run.h5"
    path.write_bytes(store_content)
    return path

"""Every test of reports writes runs into a folder of its own."""

import pytest

from kit import paths
from kit.pipeline import provenance


@pytest.fixture(scope="session")
def machine() -> dict:
    """What is collected of this machine, once."""
    return provenance.collect()


@pytest.fixture(autouse=True)
def _outputs(tmp_path, monkeypatch, machine):
    monkeypatch.setattr(paths, "OUTPUTS", tmp_path)
    monkeypatch.setattr(provenance, "collect", lambda: machine)

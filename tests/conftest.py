"""Shared fixtures: the corpus of real adapters (skipped with a reason where a machine does not have it)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CORPUS = Path(os.environ.get("UPPARAM_CORPUS", Path(__file__).parents[2] / "shared" / "corpus"))


@pytest.fixture(scope="session")
def corpus() -> Path:
    if not (CORPUS / "manifest.tsv").is_file():
        pytest.skip(f"the corpus of real adapters is not on this machine (looked in {CORPUS}; set UPPARAM_CORPUS)")
    return CORPUS

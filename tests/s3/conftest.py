"""Fixtures of the integration tests: a small run with local artifacts."""

from tests.integration.conftest import small_run

__all__ = ["small_run"]

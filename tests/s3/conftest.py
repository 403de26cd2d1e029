"""The small run of the integration tests, whose artifacts here lie in a store, too."""

from tests.integration.conftest import small_run

__all__ = ["small_run"]

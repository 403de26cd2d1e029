"""Settings of the unit tests."""

from __future__ import annotations

import os

from hypothesis import settings

# What lands must not depend on luck; at a desk every run tries other examples.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI") == "true":
    settings.load_profile("ci")

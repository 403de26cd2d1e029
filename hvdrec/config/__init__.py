"""The configuration of a run: sections, features, loading and overrides."""

from hvdrec.config.run import Config, load, override

__all__ = ["Config", "load", "override"]

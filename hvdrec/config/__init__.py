"""The configuration of a run: sections, features, loading and overrides."""

from hvdrec.config.run import Config, load, load_config, override, with_fields
from hvdrec.config.stored import from_stored

__all__ = ["Config", "from_stored", "load", "load_config", "override", "with_fields"]

"""The configuration of a run: sections, features, loading and overrides."""

from hvdrec.config.loading import load_config, with_fields
from hvdrec.config.root import Config
from hvdrec.config.schema import Feature, Schema
from hvdrec.config.stored import from_stored

__all__ = ["Config", "Feature", "Schema", "from_stored", "load_config", "with_fields"]

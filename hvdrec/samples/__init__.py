"""Raw tables to labelled, split samples."""

from hvdrec.samples.make import SamplesResult, make_samples

__all__ = ["SamplesResult", "make_samples"]

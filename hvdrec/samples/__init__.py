"""Turn raw tables into samples: labelled rows, divided into train, validation and test."""

from hvdrec.samples.make import SamplesResult, make_samples

__all__ = ["SamplesResult", "make_samples"]

"""Write a first configuration for tables that were never seen before: ``hvdrec init``."""

"""The embedding store in Redis and its publisher; they need the extra ``redis``."""

"""Promotion: compare a new model with the one that serves, then publish or refuse the new one."""

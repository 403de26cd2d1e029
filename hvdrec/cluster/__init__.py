"""Check hosts and this machine."""

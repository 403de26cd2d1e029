"""Check hosts before a launch, and this machine."""

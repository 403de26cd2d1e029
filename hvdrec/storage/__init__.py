"""Files: atomic artifact directories, and local and remote paths."""

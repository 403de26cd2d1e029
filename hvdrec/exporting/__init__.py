"""Write a bundle from a checkpoint, and check that both give the same scores."""

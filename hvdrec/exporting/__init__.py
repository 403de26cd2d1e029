"""From a checkpoint to a bundle, and the proof that they agree."""

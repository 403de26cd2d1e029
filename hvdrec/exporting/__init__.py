"""From a checkpoint to a bundle, with a comparison of their scores."""

"""One file a launcher: each builds a Rank and calls common.training.train."""

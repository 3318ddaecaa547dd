"""Ways to train a classifier that is harder to evade, or seems to be: one a file, all objectives for the one fit()."""

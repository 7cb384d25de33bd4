"""Fit, prepare queries, scan, rank: the stages of a run, each a loop over batches into a folder."""

"""A model: what it is asked, which layers count, its passes as streams of layers' batches."""

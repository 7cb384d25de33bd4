"""Is it true? What scores predict, held against what happens."""

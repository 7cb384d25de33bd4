"""What tests and benches share about the ops; no hot path imports it."""

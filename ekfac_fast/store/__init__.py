"""The only code that writes results: atomic, checked, resumable; no pickle."""

"""Contestants of `bench/race.py`: one script each, run as a process of its own."""

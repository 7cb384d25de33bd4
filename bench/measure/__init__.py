"""How it is measured: time and memory of calls, roofs, where; and the row that is written."""

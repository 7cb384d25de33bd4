"""What is shown: tables from rows, the roofline, bounds for GPUs that are not here."""

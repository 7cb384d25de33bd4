"""One tracker a stage: from kronfluence's hooks to our ops, results in kronfluence's storage."""

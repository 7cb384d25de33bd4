"""What is compared: our ops and stages, kronfluence's, and plain torch's; on which shapes."""

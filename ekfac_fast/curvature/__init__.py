"""The mathematics of curvature: tensors in, tensors out, for the driver and the drop-in alike."""

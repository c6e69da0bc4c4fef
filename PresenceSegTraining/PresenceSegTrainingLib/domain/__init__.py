"""Plain data of the training side; imports no torch and no Slicer."""

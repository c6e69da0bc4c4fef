"""What needs torch: runs in the worker process and on the command line, never inside Slicer."""

"""What touches the scene and the widgets: runs inside Slicer, never imports torch."""

"""The command line `presenceseg`."""

"""The library of the PresenceSeg module: volumes, structures, cases, projects, models and inference."""

__version__ = "0.1.0"

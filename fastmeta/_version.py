"""The version of the package, in a file of its own so that any module may read it."""

__version__ = "0.1.0"

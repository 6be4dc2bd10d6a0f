"""The command line: ``fastmeta train | evaluate | doctor``."""

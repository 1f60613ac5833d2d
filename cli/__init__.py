"""The command line: parse, validate, present."""

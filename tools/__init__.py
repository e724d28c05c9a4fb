"""The command line: one module a command; `cli.py` parses, `console.py` prints. Imported by nothing."""

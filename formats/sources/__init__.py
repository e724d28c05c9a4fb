"""Sources of records: one module a kind, each of which implements the protocols of `stagein.formats.source`."""

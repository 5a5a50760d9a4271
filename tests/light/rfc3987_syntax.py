"""Stands in for an optional import of jsonschema: its grammar costs each process that reads notebooks two seconds."""

raise ImportError

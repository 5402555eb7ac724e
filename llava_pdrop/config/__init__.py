"""A run as YAML: `load` reads it, `schema` says which keys there are."""

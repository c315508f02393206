"""Config: the schema and the loader."""

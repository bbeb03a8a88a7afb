"""Reading and writing files: seals, tables, plots."""

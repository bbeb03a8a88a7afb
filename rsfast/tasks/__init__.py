"""What is particular to a task: how its networks are scored, and what of that is shown."""

"""A training run: building it, saving it, continuing it, and what it writes."""

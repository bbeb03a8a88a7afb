"""The paper's tables and figures as sets of trainings: `python -m rsfast.experiments SET`."""

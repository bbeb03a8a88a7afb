"""Processes, signals, and what a run stands on."""

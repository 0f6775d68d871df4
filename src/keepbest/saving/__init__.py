"""Saves on their way: what is written now, or by a thread, and what could not be."""

"""Adapters for training frameworks, and hooks for loggers. keepbest itself imports none of these."""

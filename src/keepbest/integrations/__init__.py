"""Adapters for training frameworks. keepbest itself imports none of them; each needs the extra of its name."""

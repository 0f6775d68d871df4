"""A model as torch sees it: wrappers and plain names, kinds of sharding, parts, and the modules they lie in."""

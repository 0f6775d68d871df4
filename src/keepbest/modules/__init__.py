"""The structure of a model: its wrappers and plain names, kinds of sharding, parts, and the modules of the parts."""

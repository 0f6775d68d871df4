"""The formats that weights are written in."""

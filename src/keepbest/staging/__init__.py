"""Memory on the host in which a snapshot stands until it is written."""

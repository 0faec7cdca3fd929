"""One file per operation: a torch reference that defines it, and the fast paths that must equal it."""

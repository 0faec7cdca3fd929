"""Where keys and values live: pages and their owners, and the prefix tree that shares them."""

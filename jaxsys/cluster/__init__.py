"""Start, join and supervise processes, on one machine or many; shape the links between them."""

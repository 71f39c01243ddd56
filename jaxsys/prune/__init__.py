"""Prune language models after training, with every common metric, and search for new ones."""

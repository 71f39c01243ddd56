"""Models shipped for people who bring none of their own."""

"""Serving: an engine with paged memory, an OpenAI-compatible server, and a load generator."""

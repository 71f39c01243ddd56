"""The command line; no logic lives here."""

"""DreamDDP: partial local SGD with planned, overlapped synchronisation (arXiv 2502.11058)."""

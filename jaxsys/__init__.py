"""jaxsys: ten published systems for efficient large models as pure JAX functions over pytrees.

Importing this package is fast, touches no device and sets no global configuration. Import the part
that you need: ``from jaxsys import localsgd`` or ``from jaxsys.core import tree``.
"""

__version__ = "0.1.0"

"""All editing methods by name."""

from jaxsys.edit.contract import Method

METHODS: dict[str, Method] = {}

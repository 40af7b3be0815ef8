"""What verl's entry point loads: verl hides why a plugin fails, so it is said here."""

import logging

try:
    from stepcredit.adapters import verl
except Exception:
    logging.getLogger("stepcredit").exception("stepcredit: its credit functions are not in verl's registry, because:")
    raise

__all__ = ["verl"]

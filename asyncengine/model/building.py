"""At most one thread makes a model of transformers' at a time."""

from __future__ import annotations

import threading

BUILDING = threading.Lock()
"""Held while transformers makes a model: it sets torch's default dtype for that time, and two threads that do so at
once restore each other's."""

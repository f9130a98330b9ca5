"""The command line. Only click is loaded here: each command loads what it needs when it runs."""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]

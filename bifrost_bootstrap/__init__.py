"""
Brings a Bifrost deployment into a state in which it may start.

Importing this package reads no setting, imports no driver and connects to nothing.
"""

__version__ = "0.1.0"

"""Connector `qemu`: the memory of guests that QEMU runs, on this host or in another guest."""

from engine.connectors.qemu.connector import QemuConnector

__all__ = ["QemuConnector"]

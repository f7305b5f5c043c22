"""Netlink sockets: the kernel's own, to which no descriptor leads, and what /proc/net/netlink says of each.

Sources: Linux net/netlink/af_netlink.{c,h} (netlink_native_seq_show), include/linux/rhashtable{,-types}.h,
include/net/sock.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from engine.errors import FaultError, NotFoundError
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import Objects

PROTOCOLS = 32
"""MAX_LINKS (include/uapi/linux/netlink.h)."""
BUCKET_LIMIT = 1 << 20
CHAIN_LIMIT = 1 << 16


class NetlinkTable:
    """Reads the table of netlink sockets in one operation."""

    def __init__(self, kernel: Kernel, objects: Objects) -> None:
        """Raises NotFoundError where the kernel's types or symbols lack what this needs."""
        self.objects = objects
        self.start = kernel.profile.require("nl_table")
        self.first_namespace = kernel.profile.symbol("init_net") or _of_idle_task(kernel, objects)
        self.table, self.buckets = objects.struct("netlink_table"), objects.struct("bucket_table")
        self.socket, self.sock = objects.struct("netlink_sock"), objects.struct("sock")
        self.node = self.socket["node"]

    def sockets(self) -> Iterator[int]:
        """The addresses of all netlink sockets of the first network namespace, by protocol."""
        objects = self.objects
        tables = objects.pointer(self.start)
        namespace = self.sock["__sk_common.skc_net.net"]
        for protocol in range(PROTOCOLS):
            try:
                buckets = objects.pointer(tables + protocol * self.table.size + self.table["hash.tbl"].offset)
                if not objects.is_pointer(buckets):
                    continue
                for sock in self._of(buckets):
                    if self.first_namespace in (None, objects.pointer(sock + namespace.offset)):
                        yield sock
            except FaultError:
                objects.skipped["netlink table"] += 1

    def _of(self, table: int) -> Iterator[int]:
        """The members of a hash table; chains end with an odd pointer, bit 0 of a bucket is its lock."""
        objects = self.objects
        count = objects.value(table, self.buckets["size"])
        if objects.value(table, self.buckets["nest"]) or count > BUCKET_LIMIT:
            objects.skipped["netlink table"] += 1  # grown while memory was short: in parts
            return
        data = objects.memory.read(table + self.buckets["buckets"].offset, count * objects.word)
        for first in np.frombuffer(data, objects.word_type).tolist():
            at, steps = first & ~1, 0
            while objects.is_pointer(at) and steps < CHAIN_LIMIT:
                yield at - self.node.offset
                at, steps = objects.pointer(at), steps + 1

    def facts(self, sock: int) -> dict[str, Any]:
        """What /proc/net/netlink says of a socket, by the names of its columns. Raises FaultError, NotFoundError."""
        objects = self.objects
        groups = objects.pointer(sock + self.socket["groups"].offset)
        running = self.socket.get("cb_running")
        drops = self.sock.get("sk_drops.counter")
        return {
            "groups": f"{objects.memory.u32(groups) if groups else 0:#010x}",
            "receive_queue": objects.value(sock, self.sock["sk_backlog.rmem_alloc.counter"]),
            "send_queue": objects.value(sock, self.sock["sk_wmem_alloc.refs.counter"]) - 1,
            "dump": None if running is None else objects.value(sock, running),
            "references": objects.value(sock, self.sock["__sk_common.skc_refcnt.refs.counter"]),
            "drops": None if drops is None else objects.value(sock, drops),
        }

    def inode(self, sock: int) -> int:
        """The number of a socket's inode; 0 of one that has none. Raises FaultError, NotFoundError."""
        objects = self.objects
        told = self.sock.get("sk_ino")
        if told is not None:
            return objects.value(sock, told)
        socket = objects.pointer(sock + self.sock["sk_socket"].offset)
        if not socket:
            return 0
        both = objects.struct("socket_alloc")
        start = socket - both["socket"].offset + both["vfs_inode"].offset
        return objects.value(start, objects.struct("inode")["i_ino"])


def _of_idle_task(kernel: Kernel, objects: Objects) -> int | None:
    """The network namespace that began with the kernel: the idle task's; None where it cannot be read."""
    try:
        member = objects.struct("task_struct")["nsproxy"]
        proxy = objects.pointer(kernel.profile.require("init_task") + member.offset)
        return objects.pointer(proxy + objects.struct("nsproxy")["net_ns"].offset)
    except (FaultError, NotFoundError):
        return None


def netlink_table(kernel: Kernel, objects: Objects) -> NetlinkTable | None:
    """The same; None where the kernel does not tell enough."""
    try:
        return NetlinkTable(kernel, objects)
    except NotFoundError:
        return None

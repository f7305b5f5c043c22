"""Sockets: what a descriptor of kind socket leads to.

Sources: Linux include/net/{sock,af_unix,inet_sock,tcp_states}.h, net/netlink/af_netlink.h, net/packet/internal.h,
include/linux/{net,socket}.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from typing import Any

from engine.errors import FaultError, NotFoundError
from engine.layout import StructLayout
from engine.oslayer import Sockets
from engine.oslayers.linux.files import Descriptors
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.netlink import netlink_table
from engine.oslayers.linux.objects import Objects, decoded
from engine.oslayers.linux.paths import FILE_TYPE, SOCKET
from engine.oslayers.linux.tasks import TaskRecord, Tasks
from engine.types import SocketInfo

UNIX, INET, INET6, NETLINK, PACKET = 1, 2, 10, 16, 17
FAMILIES = {UNIX: "unix", INET: "inet", INET6: "inet6", NETLINK: "netlink", PACKET: "packet", 38: "alg", 40: "vsock"}
"""include/linux/socket.h."""
SOCK_RAW = 3
KINDS = {1: "stream", 2: "dgram", 3: "raw", 4: "rdm", 5: "seqpacket", 6: "dccp", 10: "packet"}
PROTOCOLS = {
    0: "ip", 1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp", 136: "udplite", 262: "mptcp", 255: "raw",
}  # fmt: skip
STATES = {
    1: "ESTABLISHED", 2: "SYN_SENT", 3: "SYN_RECV", 4: "FIN_WAIT1", 5: "FIN_WAIT2", 6: "TIME_WAIT", 7: "CLOSE",
    8: "CLOSE_WAIT", 9: "LAST_ACK", 10: "LISTEN", 11: "CLOSING", 12: "NEW_SYN_RECV",
}  # fmt: skip
"""include/net/tcp_states.h; sockets of other families use the same numbers."""
UNIX_PATH_LIMIT = 110
"""sizeof(struct sockaddr_un) (include/uapi/linux/un.h)."""


class LinuxSockets(Sockets):
    """The sockets that the processes of a kernel have open."""

    def __init__(self, kernel: Kernel, tasks: Tasks, records: Callable[[], list[TaskRecord]]) -> None:
        self.kernel = kernel
        self.tasks = tasks
        self.records = records

    def sockets(self) -> Iterator[SocketInfo]:
        """See `Sockets.sockets`."""
        reader = SocketReader(self.kernel, self.tasks)
        for record in sorted(self.records(), key=lambda one: one.pid):
            yield from reader.of(record)
        yield from reader.of_kernel()


class SocketReader:
    """Reads sockets in one operation: a socket that several descriptors share is read once."""

    def __init__(self, kernel: Kernel, tasks: Tasks) -> None:
        """Raises NotFoundError where the kernel's types lack what this needs."""
        self.descriptors = Descriptors(kernel, tasks)
        self.objects: Objects = self.descriptors.objects
        objects = self.objects
        self.private = objects.struct("file")["private_data"]
        self.kind = objects.struct("socket")["type"]
        self.sock_of = objects.struct("socket")["sk"]
        self.sock = objects.struct("sock")
        self.mode = self.descriptors.paths.mode
        self.number = self.descriptors.paths.number
        self.netlink = netlink_table(kernel, objects)
        self._known: dict[int, dict[str, Any] | None] = {}

    def of_kernel(self) -> Iterator[SocketInfo]:
        """Netlink sockets to which no descriptor leads that `of` has met."""
        if self.netlink is None:
            return
        met = {found["object"] for found in self._known.values() if found is not None}
        try:
            for sock in self.netlink.sockets():
                if sock not in met:
                    found = {"inode": self.netlink.inode(sock), "object": sock, **self._of_sock(sock, SOCK_RAW)}
                    yield SocketInfo(pid=None, descriptor=None, **found)
        except (FaultError, NotFoundError):
            self.objects.skipped["netlink table"] += 1

    def of(self, record: TaskRecord) -> Iterator[SocketInfo]:
        """The sockets of one process, by descriptor."""
        for number, file in self.descriptors.files(record.address):
            found = self._socket(file)
            if found is not None:
                yield SocketInfo(pid=record.pid, descriptor=number, **found)

    def _socket(self, file: int) -> dict[str, Any] | None:
        if file not in self._known:
            try:
                self._known[file] = self._read(file)
            except (FaultError, NotFoundError):
                self.objects.skipped["socket"] += 1
                self._known[file] = None
        return self._known[file]

    def _read(self, file: int) -> dict[str, Any] | None:
        objects = self.objects
        inode = objects.pointer(file + self.descriptors.inode.offset)
        if not inode or objects.value(inode, self.mode) & FILE_TYPE != SOCKET:
            return None
        socket = objects.pointer(file + self.private.offset)
        sock = objects.pointer(socket + self.sock_of.offset)
        kind = objects.value(socket, self.kind)
        found: dict[str, Any] = {
            "family": "none", "kind": KINDS.get(kind, str(kind)), "protocol": "none", "state": None,
            "local": None, "remote": None, "inode": objects.value(inode, self.number), "uid": None,
            "object": sock or None, "extra": {},
        }  # fmt: skip
        return found | self._of_sock(sock, kind) if objects.is_pointer(sock) else found

    def _of_sock(self, sock: int, kind: int) -> dict[str, Any]:
        """What a `struct sock` says. Raises FaultError, NotFoundError."""
        objects = self.objects
        found: dict[str, Any] = {"kind": KINDS.get(kind, str(kind)), "local": None, "remote": None, "extra": {}}
        family = objects.value(sock, self.sock["__sk_common.skc_family"])
        protocol = objects.value(sock, self.sock["sk_protocol"])
        state = objects.value(sock, self.sock["__sk_common.skc_state"])
        uid = self.sock.get("sk_uid.val", "sk_uid")
        found |= {
            "family": FAMILIES.get(family, str(family)),
            "protocol": PROTOCOLS.get(protocol, str(protocol)) if family in (INET, INET6) else str(protocol),
            "state": STATES.get(state, str(state)),
            "uid": None if uid is None else objects.value(sock, uid),
        }
        read = {UNIX: self._unix, INET: self._inet, INET6: self._inet, NETLINK: self._netlink, PACKET: self._packet}
        if family in read:
            found |= read[family](sock, family)
        return found

    def _inet(self, sock: int, family: int) -> dict[str, Any]:
        objects, sock_layout = self.objects, self.sock
        port = objects.value(sock, sock_layout["__sk_common.skc_num"])
        peer = int.from_bytes(objects.value(sock, sock_layout["__sk_common.skc_dport"]).to_bytes(2, "little"), "big")
        names = ("skc_rcv_saddr", "skc_daddr") if family == INET else ("skc_v6_rcv_saddr", "skc_v6_daddr")
        size = 4 if family == INET else 16
        local, remote = (
            objects.memory.read(sock + sock_layout[f"__sk_common.{name}"].offset, size) for name in names
        )
        return {"local": _end(local, port), "remote": _end(remote, peer)}

    def _unix(self, sock: int, family: int) -> dict[str, Any]:
        layout = self.objects.struct("unix_sock")
        peer = self.objects.pointer(sock + layout["peer"].offset)
        named = self._unix_name(sock, layout)
        remote = self._unix_name(peer, layout) if self.objects.is_pointer(peer) else None
        return {"local": named, "remote": remote, "protocol": "0", "extra": {"peer": f"{peer:#x}" if peer else None}}

    def _unix_name(self, sock: int, layout: StructLayout) -> str | None:
        """Its path, or `@` and the name of an abstract one; None where it is not bound."""
        address = self.objects.pointer(sock + layout["addr"].offset)
        if not address:
            return None
        shape = self.objects.struct("unix_address")
        length = min(self.objects.value(address, shape["len"]), UNIX_PATH_LIMIT)
        data = self.objects.memory.read(address + shape["name"].offset, length)[2:]
        if data.startswith(b"\0"):
            return "@" + decoded(data[1:].replace(b"\0", b"@"))
        return decoded(data.partition(b"\0")[0])

    def _netlink(self, sock: int, family: int) -> dict[str, Any]:
        layout = self.objects.struct("netlink_sock")
        portid = self.objects.value(sock, layout["portid"])
        extra = {} if self.netlink is None else self.netlink.facts(sock)
        return {"local": str(portid), "remote": str(self.objects.value(sock, layout["dst_portid"])), "extra": extra}

    def _packet(self, sock: int, family: int) -> dict[str, Any]:
        layout = self.objects.types.struct("packet_sock")
        if layout is None:  # a module of its own on some kernels
            return {}
        number = self.objects.value(sock, layout["num"])
        swapped = int.from_bytes(number.to_bytes(2, "little"), "big")
        return {"local": f"{swapped:#06x}", "extra": {"interface": self.objects.value(sock, layout["ifindex"])}}


def _end(address: bytes, port: int) -> str:
    if len(address) == 4:
        return f"{ipaddress.IPv4Address(address)}:{port}"
    wide = ipaddress.IPv6Address(address)
    text = f"::ffff:{wide.ipv4_mapped}" if wide.ipv4_mapped is not None else str(wide)
    return f"[{text}]:{port}"

"""Sockets in the formats of /proc/net (proc(5)): tcp, udp, udplite and raw, each with its 6; unix, netlink, packet.

What is not known of a socket (queues, timers) is 0.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from engine.types import SocketInfo

STATES = (
    "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT", "LAST_ACK",
    "LISTEN", "CLOSING", "NEW_SYN_RECV",
)  # fmt: skip
"""By number from 1 on (Linux include/net/tcp_states.h)."""
FILES: dict[str, tuple[str, str | None]] = {
    **{f"{name}{six}": (f"inet{six}", name) for name in ("tcp", "udp", "udplite", "raw") for six in ("", "6")},
    "unix": ("unix", None), "netlink": ("netlink", None), "packet": ("packet", None),
}  # fmt: skip
"""File → family, and protocol or kind, of the sockets in it."""
_INET_HEAD = (
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"
)
_INET6_HEAD = (
    "  sl  local_address                         remote_address                        st tx_queue rx_queue "
    "tr tm->when retrnsmt   uid  timeout inode"
)
_UNIX_HEAD = "Num       RefCount Protocol Flags    Type St Inode Path"
_NETLINK_HEAD = (
    "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode"
)
_PACKET_HEAD = "sk               RefCnt Type Proto  Iface R Rmem   User   Inode"
_HEADS = {"inet": _INET_HEAD, "inet6": _INET6_HEAD, "unix": _UNIX_HEAD, "netlink": _NETLINK_HEAD,
          "packet": _PACKET_HEAD}  # fmt: skip
_KINDS = {"stream": 1, "dgram": 2, "raw": 3, "seqpacket": 5}
_LISTENING = 1 << 16
"""__SO_ACCEPTCON (Linux include/uapi/linux/net.h)."""


def net_lines(name: str, sockets: Iterable[SocketInfo]) -> Iterator[str]:
    """The lines of /proc/net/NAME; a socket that several descriptors share stands there once."""
    family, protocol = FILES[name]
    seen: set[int | None] = set()
    chosen = []
    for socket in sockets:
        wanted = protocol in (None, socket.kind if protocol == "raw" else socket.protocol)
        if socket.family == family and wanted and socket.object not in seen:
            seen.add(socket.object)
            chosen.append(socket)
    yield _HEADS[family] + "\n"
    lines = {"unix": _unix_line, "netlink": _netlink_line, "packet": _packet_line}
    for number, socket in enumerate(chosen):
        yield lines[family](socket) if family in lines else _inet_line(number, socket)


def _inet_line(number: int, socket: SocketInfo) -> str:
    return (
        f"{number:4d}: {_end(socket.local)} {_end(socket.remote)} {_state(socket):02X} 00000000:00000000 "
        f"00:00000000 00000000 {socket.uid or 0:5d}        0 {socket.inode or 0} 1 {socket.object or 0:016x}\n"
    )


def _state(socket: SocketInfo) -> int:
    return STATES.index(socket.state) + 1 if socket.state in STATES else 0


def _end(text: str | None) -> str:
    """Address and port in hexadecimal, each word in the byte order of a little-endian kernel."""
    host, _, port = (text or "0.0.0.0:0").rpartition(":")
    data = ipaddress.ip_address(host.strip("[]")).packed
    words = "".join(data[start : start + 4][::-1].hex().upper() for start in range(0, len(data), 4))
    return f"{words}:{int(port):04X}"


def _unix_line(socket: SocketInfo) -> str:
    listening = socket.state == "LISTEN"
    connected = socket.state == "ESTABLISHED"
    name = f" {socket.local}" if socket.local else ""
    return (
        f"{socket.object or 0:016x}: 00000002 00000000 {_LISTENING if listening else 0:08X} "
        f"{_KINDS.get(socket.kind, 0):04X} {3 if connected else 1:02X} {socket.inode or 0:5d}{name}\n"
    )


def _netlink_line(socket: SocketInfo) -> str:
    facts = socket.extra
    numbers = (facts.get(name) or 0 for name in ("receive_queue", "send_queue", "dump", "references", "drops"))
    received, sent, dump, references, drops = numbers
    groups = int(facts.get("groups") or "0", 16)
    return (
        f"{socket.object or 0:016x} {socket.protocol:<3} {socket.local or 0:<10} {groups:08x} "
        f"{received:<8} {sent:<8} {dump:<5} {references:<8} {drops:<8} {socket.inode or 0:<8}\n"
    )


def _packet_line(socket: SocketInfo) -> str:
    """References, queue and whether it runs are not known."""
    protocol, interface = int(socket.local or "0", 16), int(socket.extra.get("interface") or 0)
    return (
        f"{socket.object or 0:016x} {0:<6} {_KINDS.get(socket.kind, 0):<4} {protocol:04x}   {interface:<5} 0 {0:<6} "
        f"{socket.uid or 0:<6} {socket.inode or 0:<6}\n"
    )

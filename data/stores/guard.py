"""Hosts that no URL may lead to: link-local addresses, where clouds hand out a machine's credentials."""

from __future__ import annotations

import ipaddress
import socket

# Prefixes of IPv6 whose last 32 bits are an IPv4 address: mapped, compatible, NAT64.
_EMBEDDED = [ipaddress.ip_network(prefix) for prefix in ("::ffff:0:0/96", "::/96", "64:ff9b::/96")]
_METADATA = ipaddress.ip_address("fd00:ec2::254")  # the same service of EC2, outside fe80::/10


class LinkLocal(Exception):
    """A host is, or resolves to, a link-local address; says which."""


def is_link_local(address: str) -> bool:
    """Whether an IP address lies in 169.254.0.0/16 or fe80::/10, also in the guise of another IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_link_local
    inner = ip.sixtofour
    if any(ip in prefix for prefix in _EMBEDDED):
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_link_local or ip == _METADATA or bool(inner and inner.is_link_local)


def refuse_link_local(host: str) -> None:
    """Resolve `host` as a connection would (so decimal, hex and octal spellings too), and refuse link-local ones.

    A host that cannot be resolved passes: nothing can connect to it from here.

    Raises:
        LinkLocal: it leads to a link-local address.
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)}
    except (OSError, ValueError):
        return
    for address in found:
        if is_link_local(address):
            raise LinkLocal(f"{host} is the link-local address {address}, which no URL of data may lead to")

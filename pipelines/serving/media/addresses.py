"""Which addresses of the network a server may dial for a stranger: public ones, and nothing that leads back into its own network."""

from __future__ import annotations

import ipaddress
import re

from molmo_core.config import ConfigError

_NETWORKS = [
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
        "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24",
        "203.0.113.0/24", "224.0.0.0/3",
        "168.63.129.16/32",  # Azure answers there from inside
        "2001::/23",  # Teredo, ORCHID, benchmarking and other protocols
        "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
    )
]  # fmt: skip
_IPV6_UNICAST = ipaddress.ip_network("2000::/3")
"""All that is given out: what is outside is local, or holds an IPv4 address (mapped, compatible, NAT64)."""
_ISATAP = (0x00005EFE, 0x02005EFE)  # upper half of the interface's number; the lower half is an IPv4 address

HTTPS_PORT = 443

_LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def is_public(address: str) -> bool:
    """Whether an address, as a resolver gives it, is one of the public internet. Anything that is not an address is not."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if (
        not ip.is_global
        or ip.is_multicast
        or ip.is_reserved
        or any(ip in network for network in _NETWORKS if network.version == ip.version)
    ):
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return True
    return ip in _IPV6_UNICAST and ip.scope_id is None and (int(ip) >> 32 & 0xFFFFFFFF) not in _ISATAP


def is_name(host: str) -> bool:
    """Whether a host is a name in lower case, and in no spelling an address (`127.0.0.1`, `0x7f.1`, `2130706433`, `[::1]`)."""
    return len(host) <= 253 and _NAME.fullmatch(host) is not None and not _NUMBER.fullmatch(host.rpartition(".")[2])


def host_and_port(entry: str) -> tuple[str, int]:
    """An entry of a list of allowed hosts: `name`, or `name:port`.

    Raises:
        ConfigError: it is no name, such as an address in any spelling.
    """
    name, colon, port = entry.partition(":")
    if not is_name(name) or (colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)):
        raise ConfigError(f"serve: allowed_media_hosts: {entry!r} must be a host's name in lower case (no address), or name:port")
    return name, int(port) if colon else HTTPS_PORT

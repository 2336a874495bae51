"""Addresses that must not be dialled for a stranger, in every spelling; and names that are none."""

import ipaddress
import itertools
import socket

import pytest

from molmo_core.config import ConfigError
from pipelines.serving.config import ServeConfig
from pipelines.serving.media.addresses import host_and_port, is_name, is_public

PUBLIC = ["1.1.1.1", "8.8.8.8", "93.184.215.14", "142.250.74.46", "172.15.255.255", "172.32.0.1", "100.63.255.255", "100.128.0.1",
          "11.0.0.1",
          "2606:4700:4700::1111", "2a00:1450:4001:830::200e", "2620:fe::fe"]  # fmt: skip
PRIVATE = [
    "0.0.0.0", "0.0.0.1", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.0.1.3", "127.255.255.254",
    "169.254.0.1", "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.192", "192.0.2.7",
    "192.88.99.1", "192.168.0.1", "192.168.255.255", "198.18.0.1", "198.19.255.255", "198.51.100.4", "203.0.113.9", "224.0.0.1",
    "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16",
]  # fmt: skip
IPV6 = [
    "::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "fd20:ce::254", "ff02::1", "ff0e::1", "100::1",
    "100:0:0:1::1",
    "2001::1", "2001:2::1", "2001:10::1", "2001:20::1", "2001:db8::1", "3fff::1", "5f00::1", "4000::1", "64:ff9b:1::a00:1",
    "2620:4f:8000::1", "2606:4700:4700::1111%eth0",
]  # fmt: skip


def wrapped(address: str) -> list[str]:
    """IPv6 addresses that hold an IPv4 address."""
    number = int(ipaddress.IPv4Address(address))
    high, low = number >> 16, number & 0xFFFF
    return [
        f"::ffff:{address}", f"::ffff:{high:x}:{low:x}", f"0:0:0:0:0:ffff:{address}",  # mapped
        f"::{address}", f"::ffff:0:{address}",  # compatible, translated
        f"64:ff9b::{address}", f"64:ff9b:1::{address}",  # NAT64
        f"2002:{high:x}:{low:x}::1", f"2002:{high:x}:{low:x}:1::{address}",  # 6to4
        f"2001:0:{high:x}:{low:x}::1", f"2001::{0xFFFF ^ high:x}:{0xFFFF ^ low:x}",  # Teredo: server, client
        f"2606:4700::5efe:{address}", f"2606:4700::200:5efe:{address}",  # ISATAP
    ]  # fmt: skip


def spelled(address: str) -> list[str]:
    """An IPv4 address as inet_aton and browsers read it."""
    a, b, c, d = map(int, address.split("."))
    number = (a << 24) + (b << 16) + (c << 8) + d
    groups = [(str(x), hex(x), f"0{x:o}", f"0x{x:02X}") for x in (a, b, c, d)]
    mixed = [".".join(parts) for parts in itertools.islice(itertools.product(*groups), 0, None, 17)]
    return [
        *mixed, str(number), hex(number), hex(number).upper(), f"0{number:o}", f"{a}.{number & 0xFFFFFF}", f"{a}.{b}.{number & 0xFFFF}",
        f"{address}.", f"00000{a}.{b}.{c}.{d}", f"[::ffff:{address}]", "".join(chr(0xFF10 + int(x)) if x.isdigit() else x for x in address),
        address.replace(".", "。"), f" {address}", f"{address}#", f"{address}%00",
    ]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address):
    assert is_public(address)


def test_not_public():
    refused = [*PRIVATE, *IPV6, *(each for address in [*PRIVATE, *PUBLIC[:4]] for each in wrapped(address))]
    assert len(refused) > 400
    assert [address for address in refused if is_public(address)] == []
    for address in wrapped("127.0.0.1"):
        assert ipaddress.ip_address(address), "the table holds addresses"


def test_the_edges_of_every_network():
    for network in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16", "100.64.0.0/10", "224.0.0.0/3"):
        block = ipaddress.ip_network(network)
        assert not is_public(str(block[0]))
        assert not is_public(str(block[-1]))


def test_no_spelling_of_an_address_is_a_name():
    """`socket.inet_aton` is what a resolver falls back to."""
    spellings = [each for address in [*PRIVATE, *PUBLIC[:3]] for each in (address, *spelled(address))]
    spellings += [
        *IPV6,
        *(f"[{address}]" for address in IPV6),
        "127.1",
        "0",
        "0x",
        "127.0.0.1.",
        "1.2.3.4.5",
        "a.b.0x1",
        "a.1",
        "localhost.1",
    ]
    assert len(spellings) > 900
    assert [each for each in spellings if is_name(each)] == []
    for each in ("0x7f000001", "2130706433", "017700000001", "127.1"):
        assert socket.inet_aton(each) == b"\x7f\0\0\1"
        assert not is_public(each)


@pytest.mark.parametrize(
    "name", ["example.com", "a", "localhost", "images.example.com", "xn--bcher-kva.example", "1and1.com", "a-b.c_d.e", "0x.com"]
)
def test_names(name):
    assert is_name(name)
    assert host_and_port(name) == (name, 443)
    assert host_and_port(f"{name}:8443") == (name, 8443)


@pytest.mark.parametrize(
    "entry", ["", ".", "*", "*.example.com", "Example.com", "example.com.", "a..b", "-a.b", "https://example.com", "example.com/",
              "user@example.com",
              "example.com:", "example.com:0", "example.com:65536", "example.com:x", "example.com:443:1", "::1", "10.0.0.1", "10.0.0.1:443",
              "bücher.example", "a b", "a\n", "x" * 64, "2130706433"],
)  # fmt: skip
def test_what_cannot_be_allowed(entry):
    with pytest.raises(ConfigError, match="must be a host's name"):
        ServeConfig(model="m", allowed_media_hosts=["example.com", entry])

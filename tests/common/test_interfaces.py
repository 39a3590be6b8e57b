"""The machine's interfaces against what psutil and the kernel's own tool say about them."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.interfaces import Interface, addresses_of, interfaces, is_loopback, is_own, route_to

ROOT = Path(__file__).resolve().parents[2]


def plain(address):
    """Without the link that some systems write behind it."""
    return address.partition("%")[0]


def test_every_address_of_every_interface_is_there_once():
    families = (socket.AF_INET, socket.AF_INET6)
    theirs = [
        (name, plain(a.address), a.family) for name, all_of in psutil.net_if_addrs().items() for a in all_of if a.family in families
    ]
    assert theirs
    assert sorted((i.name, plain(i.address), i.family) for i in interfaces()) == sorted(theirs)


def test_the_loopback_interface():
    route = route_to("127.0.0.1")
    assert route and route.name in ("lo", "lo0") and route.address == "127.0.0.1" and route.is_loopback
    assert route_to("localhost").is_loopback
    if sys.platform == "linux":  # the whole of 127.0.0.0/8 is this machine; Debian's installer gives it the host's own name
        assert route_to("127.0.1.1") == route


@pytest.mark.only_on("linux")
def test_the_route_is_the_one_that_the_kernel_tells():
    """Of each own address, the loopback interface's aside, and of a neighbour's."""
    if not shutil.which("ip"):
        pytest.skip("iproute2 is not here")
    outside = [i for i in interfaces() if not i.is_loopback and not i.one_link_only]
    for own in outside:
        assert route_to(own.address) == own  # the kernel loops it, and the address is the interface's all the same
        words = "192.0.2.9" if own.family == socket.AF_INET else "2001:db8::9"
        asked = subprocess.run(["ip", "-j", "route", "get", words], capture_output=True, text=True, timeout=10)
        found = route_to(words)
        if asked.returncode:
            assert found is None
        else:
            (said,) = json.loads(asked.stdout)
            assert (found.name, found.address) == (said["dev"], said["prefsrc"])


def test_where_no_route_leads_there_is_none():
    assert route_to("no-such-host.invalid") is None
    assert route_to("x" * 300) is None
    assert addresses_of("") == [] or all(is_loopback(to[0]) for _, to in addresses_of(""))


@pytest.mark.only_on("linux")
def test_a_host_without_a_network():
    """In a network namespace of its own, where even the loopback interface is down."""
    unshare = ["unshare", "-Urn"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are not allowed here")
    code = "from common.interfaces import *; print(interfaces(), route_to('192.0.2.9'), route_to('fd00::9'), route_to('127.0.0.1'))"
    done = subprocess.run([*unshare, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stdout == "[] None None None\n", done


def test_own_and_others():
    assert is_own("127.0.0.1") and is_own("127.0.1.1") and is_own("::1") and is_own("localhost")
    assert all(is_own(i.address) for i in interfaces())
    assert not is_own("192.0.2.201") and not is_own("no-such-host.invalid") and not is_own("")


@pytest.mark.parametrize(
    "address, loopback, one_link",
    [
        ("127.0.0.1", True, False),
        ("127.9.9.9", True, False),
        ("::1", True, False),
        ("::ffff:127.0.0.1", True, False),
        ("10.0.0.1", False, False),
        ("fe80::1%eth0", False, True),
        ("169.254.3.4", False, True),
        ("fd00::1", False, False),
    ],
)
def test_kinds_of_addresses(address, loopback, one_link):
    found = Interface("x", address, socket.AF_INET6 if ":" in address else socket.AF_INET)
    assert (found.is_loopback, found.one_link_only) == (loopback, one_link)

"""Which hosts are probed: those that the entries' updates come from, each once.

Where the environment names a proxy for a host (``http_proxy``, ``https_proxy``,
``all_proxy``, ``no_proxy``, as requests and curl read them), the proxy is probed in its
place: behind one, the machine often can neither resolve nor reach the host itself, and the
proxy is what the cycle's requests will go to.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar
from urllib.parse import urlsplit

from casync_updater.errors import ConfigError
from casync_updater.model import Entry, OnlineSettings

_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Host:
    """A host to probe: a name or an IP address, and what depends on it.

    Attributes:
        name: lower case, without brackets.
        ports: TCP ports of which any may answer.
        entries: names of the entries that wait for it.
        proxy_for: the hosts that it is the proxy for; empty where it is the host itself.
    """

    name: str
    ports: tuple[int, ...]
    entries: tuple[str, ...]
    proxy_for: tuple[str, ...] = ()

    @property
    def is_address(self) -> bool:
        """True where no name has to be resolved."""
        try:
            ipaddress.ip_address(self.name.partition("%")[0])
        except ValueError:
            return False
        return True


def hosts_of(
    entries: Iterable[Entry], settings: OnlineSettings, environment: Mapping[str, str]
) -> tuple[Host, ...]:
    """The hosts of entries with a remote source, and the settings' own.

    A host from the settings stands for every entry with a remote source, since there is
    nothing that binds it to one of them.

    Args:
        entries: all entries; those whose source is a local path take no part.
        settings: may name further hosts.
        environment: the process's own, for the proxies.

    Raises:
        ConfigError: a proxy cannot be understood.
    """
    if not settings.enabled:
        return ()
    remote = [entry for entry in entries if entry.source.remote]
    found: dict[str, Host] = {}
    for entry in remote:
        url = urlsplit(entry.source.index)
        name, port = (url.hostname or "").lower(), url.port or _PORTS[url.scheme]
        proxy = _proxy(url.scheme, name, port, environment)
        if proxy is None:
            _add(found, Host(name, (port,), (entry.name,)))
        else:
            _add(found, Host(*proxy, (entry.name,), (name,)))
    for name, port in settings.hosts:
        _add(found, Host(name, (port,), tuple(entry.name for entry in remote)))
    return tuple(found.values())


def _add(found: dict[str, Host], host: Host) -> None:
    known = found.get(host.name, replace(host, ports=(), entries=(), proxy_for=()))
    found[host.name] = Host(
        host.name,
        _union(known.ports, host.ports),
        _union(known.entries, host.entries),
        _union(known.proxy_for, host.proxy_for),
    )


def _union(one: tuple[_T, ...], other: tuple[_T, ...]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys(one + other))


def _proxy(
    scheme: str, name: str, port: int, environment: Mapping[str, str]
) -> tuple[str, tuple[int, ...]] | None:
    """Host and port of the proxy that requests to a host go through, None for none."""
    if _excepted(name, port, _variable(environment, "no_proxy")):
        return None
    variable = f"{scheme}_proxy"
    value = _variable(environment, variable)
    if not value:
        variable = "all_proxy"
        value = _variable(environment, variable)
    if not value:
        return None
    try:
        url = urlsplit(value if "://" in value else f"http://{value}")
        if not url.hostname:
            raise ValueError(value)
        usual = _PORTS.get(url.scheme, 80)
        proxy_port = url.port or usual
    except ValueError as error:
        # The value may hold a password and is not repeated.
        raise ConfigError(f"environment: {variable}: this is no address of a proxy") from error
    return url.hostname.lower(), (proxy_port,)


def _variable(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name) or environment.get(name.upper()) or ""


def _excepted(name: str, port: int, no_proxy: str) -> bool:
    for item in no_proxy.replace(" ", "").lower().split(","):
        if item == "*":
            return True
        plain = item.lstrip(".")
        if plain and any(
            host == plain or host.endswith(f".{plain}") for host in (name, f"{name}:{port}")
        ):
            return True
        try:
            if ipaddress.ip_address(name) in ipaddress.ip_network(item, strict=False):
                return True
        except ValueError:
            continue
    return False

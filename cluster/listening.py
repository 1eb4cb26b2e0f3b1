"""What commands that serve something share: who may reach them, and with which token."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from configs.errors import UsageError
from data_pipelines.storage import explain


def read_token(file: str) -> bytes:
    """The token in a file. Raises UsageError for an empty one, ShardyardError for one that cannot be read."""
    try:
        token = Path(file).read_bytes().strip()
    except OSError as error:
        raise explain(error, "read", file) from error
    if not token:
        raise UsageError(f"{file} is empty: everybody would know the token. Write a long random one into it.")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def in_url(host: str) -> str:
    """As it stands in a URL: [::1]."""
    return f"[{host}]" if ":" in host else host

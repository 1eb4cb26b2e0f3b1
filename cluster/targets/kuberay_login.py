"""The server of a Kubernetes cluster and how to log in there, as kubectl finds it, else as a pod does."""

from __future__ import annotations

import contextlib
import logging.handlers
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import Unreachable, UsageError


def connect(context: str | None) -> Any:
    """A client of the package `kubernetes`, with the credentials.

    Raises:
        Unreachable: there is no kubeconfig, or its plugin fails. UsageError: it is damaged, or has no such context; the
        package is not installed.
    """
    try:
        from kubernetes import client
    except ImportError:
        raise UsageError(
            "A target on Kubernetes needs the package kubernetes, which is not installed. Run "
            "pip install 'shardyard[kube]'."
        ) from None
    configuration = client.Configuration()
    configuration.retries = False  # whoever asks knows how much time is left
    _load(configuration, context)
    return client.ApiClient(configuration)


def credentials(client: Any, context: str | None) -> dict[str, str]:
    """The header with the token, which the package renews where it is old. Raises Unreachable where a plugin fails."""
    with _said_by_plugins(context):
        token = client.configuration.get_api_key_with_prefix("BearerToken", "authorization")
    return {"Authorization": token} if token else {}


def _load(configuration: Any, context: str | None) -> None:
    import yaml
    from kubernetes import config

    named = os.environ.get("KUBECONFIG") or "~/.kube/config"
    found = any(Path(part).expanduser().is_file() for part in named.split(os.pathsep) if part)
    in_pod = not found and context is None and "KUBERNETES_SERVICE_HOST" in os.environ
    try:
        if in_pod:
            config.load_incluster_config(client_configuration=configuration)
        elif found:
            with _said_by_plugins(context):
                config.load_kube_config(config_file=named, context=context, client_configuration=configuration)
    except (config.ConfigException, yaml.YAMLError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = f"context '{context}'" if context else "its current context"
        where = "The pod's service account" if in_pod else f"The kubeconfig {named} ({wanted})"
        raise UsageError(
            f"{where} gives no way to a Kubernetes cluster: {' '.join(str(error).split())} `kubectl config "
            "get-contexts` lists the contexts; set the target's context to one of them."
        ) from error
    if not found and not in_pod:
        raise Unreachable(
            f"There is no kubeconfig at {named}, so no Kubernetes cluster is known. Make one, as for kubectl (your "
            "cloud's command line does), or name it in KUBECONFIG."
        )


@contextlib.contextmanager
def _said_by_plugins(context: str | None) -> Iterator[None]:
    """Raise what the package only logs: that a plugin of the kubeconfig gave no credentials."""
    handler = logging.handlers.BufferingHandler(capacity=100)
    handler.setLevel(logging.ERROR)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
    if handler.buffer:
        said = "; ".join(" ".join(record.getMessage().split()) for record in handler.buffer)
        # What the package makes of a plugin that fails at a terminal, where it does not catch what the plugin says.
        said = said.replace("'NoneType' object has no attribute 'strip'", "it failed, and says above why")
        wanted = f"context '{context}'" if context else "its current context"
        raise Unreachable(
            f"The kubeconfig's plugin gives no credentials for {wanted}: {said}. See whether "
            "`kubectl get pods` works with it: log in again, or install the plugin."
        )

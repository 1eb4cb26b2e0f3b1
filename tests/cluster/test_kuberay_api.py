"""A Kubernetes API server that does not serve us, and the ways to log in there."""

from __future__ import annotations

import ipaddress
import re
import ssl
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kubernetes.config import incluster_config

from cluster.targets import kuberay_api
from configs.errors import ShardyardError, Unreachable, UsageError
from tests.cluster.kuberay_operator import DEFINITIONS, STORE, Operator, job, kubeconfig, target
from tests.cluster.kubernetes_server import KubernetesServer

# What goes wrong between here and there


def deny_everything(server: KubernetesServer) -> None:
    server.deny("*", "*")


def wrong_token(server: KubernetesServer) -> None:
    server.token = "another"


def page(server: KubernetesServer) -> None:
    server.fail(99, html=True)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (wrong_token, r"does not accept the credentials \(401\): Unauthorized\. They are wrong or have expired"),
        (deny_everything, r'cannot get resource "rayjobs" in API group "ray\.io" in .* "default".*Have that verb'),
        (lambda server: server.uninstall("ray.io"), r"has no API at .*rayjobs.*Install KubeRay's operator"),
        (lambda server: server.throttle(99, retry_after_s=60), r"cannot answer now \(429\): Too many .*in 60 s"),
        (lambda server: server.fail(99), r"cannot answer now \(503\).*try again in 10 s"),
        (page, r"cannot answer now \(503\): 503\."),
        (lambda server: server.stall(99), r"it has been silent for .* s\. Is the network or VPN"),
        (lambda server: server.reset(99), r"the connection broke: .*Try again"),
        (lambda server: server.truncate(99), r"the connection broke: .*Try again"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_serve_us(
    server: KubernetesServer, monkeypatch: pytest.MonkeyPatch, harm: Callable[[KubernetesServer], None], words: str
) -> None:
    monkeypatch.setattr(kuberay_api, "ANSWER_S", 1.0)
    harm(server)
    with pytest.raises(Unreachable, match=words) as caught:
        target().find("demo", STORE)
    assert caught.value.exit_code == 3 and server.url in str(caught.value)


def test_it_waits_less_than_ten_seconds_for_an_answer() -> None:
    assert kuberay_api.ANSWER_S < 10


@pytest.mark.parametrize(
    "harm",
    [
        lambda server: server.throttle(1, retry_after_s=1),
        lambda server: server.throttle(1, retry_after_s=1, status=True),
        lambda server: server.fail(2),
        lambda server: server.fail(1, code=500),
        lambda server: server.reset(2),
        lambda server: server.truncate(1),
    ],
)
def test_what_passes_is_not_noticed(server: KubernetesServer, harm: Callable[[KubernetesServer], None]) -> None:
    prod = target()
    job_id = prod.submit(job())
    harm(server)
    assert prod.find("demo", STORE) == job_id


@pytest.mark.parametrize(
    ("settings", "deny", "error", "words"),
    [
        ({"namespace": "none"}, None, UsageError, r'namespaces "none" not found'),
        ({}, ("create", "rayjobs"), Unreachable, r'cannot create resource "rayjobs" in API group "ray\.io"'),
        ({}, ("list", "pods"), Unreachable, r'cannot list resource "pods" in API group "" in the namespace "default"'),
        ({}, ("list", "events"), Unreachable, r'cannot list resource "events"'),
        ({}, ("delete", "rayjobs"), Unreachable, r'cannot delete resource "rayjobs"'),
        ({}, ("get", "pods/log"), Unreachable, r'cannot get resource "pods/log"'),
    ],
)
def test_each_permission_that_is_missing_is_named(
    server: KubernetesServer, operator: Operator, settings: Any, deny: Any, error: type[ShardyardError], words: str
) -> None:
    if deny:
        server.deny(*deny)
    prod = target(**settings)
    with pytest.raises(error, match=words):
        job_id = prod.submit(job())
        operator.says("Initializing")
        server.log(operator.pod("head"), "Ray runtime started.")
        prod.status(job_id)
        prod.logs(job_id)
        prod.stop(job_id)


def test_older_custom_resources_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields that they do not know would be dropped in silence, the token among them."""
    text = next(path for path in DEFINITIONS if "rayjobs" in path.name).read_text()
    (tmp_path / "rayjobs.yaml").write_text(text.replace("authOptions:", "otherOptions:"))
    with KubernetesServer(tmp_path / "rayjobs.yaml") as older:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(older, tmp_path / "kubeconfig")))
        with pytest.raises(UsageError, match=r'unknown field "spec\.rayClusterSpec\.authOptions".*updated'):
            target().submit(job())
        assert older.objects("rayjobs") == []


# Logging in


def test_a_plugin_logs_in_and_again_when_its_token_is_refused(server: KubernetesServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(server.token)
    plugin = (
        "import json, pathlib; print(json.dumps({'apiVersion': 'client.authentication.k8s.io/v1', "
        "'kind': 'ExecCredential', 'status': {'token': pathlib.Path('token').read_text()}}))"
    )
    command = {"command": sys.executable, "args": ["-c", plugin], "interactiveMode": "Never"}
    kubeconfig(server, tmp_path / "kubeconfig", exec=command | {"apiVersion": "client.authentication.k8s.io/v1"})
    prod = target()
    assert prod.find("demo", STORE) is None
    server.token = "the-next"
    with pytest.raises(Unreachable, match="401"):
        prod.find("demo", STORE)
    (tmp_path / "token").write_text("the-next")
    assert prod.find("demo", STORE) is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([sys.executable, "-c", "raise SystemExit('token expired, run login')"], "token expired, run login"),
        (["/nonexistent/plugin"], "No such file"),
    ],
)
def test_a_plugin_that_fails(
    server: KubernetesServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: list[str], words: str
) -> None:
    settings = {"apiVersion": "client.authentication.k8s.io/v1", "command": command[0], "args": command[1:]}
    kubeconfig(server, tmp_path / "kubeconfig", exec=settings)
    with pytest.raises(Unreachable, match=rf"plugin gives no credentials.*{words}.*kubectl get pods"):
        target().find("demo", STORE)
    assert capfd.readouterr() == ("", "")


def test_contexts_and_kubeconfigs(server: KubernetesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert target(context="test").find("demo", STORE) is None
    with pytest.raises(UsageError, match=r"\(context 'tset'\) gives no way.*get-contexts"):
        target(context="tset").find("demo", STORE)
    for text in ("", "a: [", "contexts: 3\n", "\x00"):
        (tmp_path / "kubeconfig").write_text(text)
        with pytest.raises(UsageError, match="gives no way to a Kubernetes cluster"):
            target().find("demo", STORE)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(Unreachable, match=r"There is no kubeconfig at .*none"):
        target().find("demo", STORE)


def test_a_server_that_is_not_there(server: KubernetesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(path.read_text().replace(server.url, "http://127.0.0.1:9"))
    with pytest.raises(Unreachable, match=r"at http://127.0.0.1:9 does not answer: .*Connection refused\. Is it up"):
        target().find("demo", STORE)
    path.write_text(path.read_text().replace("http://127.0.0.1:9", "http://nowhere.invalid"))
    with pytest.raises(Unreachable, match="its name is not known here"):
        target().find("demo", STORE)
    path.write_text(path.read_text().replace("http://nowhere.invalid", server.url.replace("http:", "https:")))
    with pytest.raises(Unreachable, match="the connection is not secure"):
        target().find("demo", STORE)


@pytest.mark.parametrize(
    ("status", "headers"), [(200, {}), (302, {"Location": "https://login.example.org/"}), (204, {})]
)
def test_what_is_no_api_server(server: KubernetesServer, tmp_path: Path, status: int, headers: dict[str, str]) -> None:
    class LoginPage(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"<html><h1>Please log in</h1></html>" if status == 200 else b"")

        def log_message(self, *_: object) -> None:
            """Be quiet."""

    with HTTPServer(("127.0.0.1", 0), LoginPage) as page:
        serving = threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        other = re.sub(
            r"http://127.0.0.1:\d+", f"http://127.0.0.1:{page.server_port}", (tmp_path / "kubeconfig").read_text()
        )
        (tmp_path / "kubeconfig").write_text(other)
        try:
            with pytest.raises(
                Unreachable, match=r"does not answer as a Kubernetes API server: .*a login page before it"
            ):
                target().find("demo", STORE)
        finally:
            page.shutdown()
            serving.join()


class Certified:
    """A certificate that signs itself, for 127.0.0.1."""

    def __init__(self, folder: Path, name: str) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        named = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(
            named, named, key.public_key(), x509.random_serial_number(), now, now + timedelta(1)
        )
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = builder.add_extension(address, False).add_extension(x509.BasicConstraints(True, None), True)
        self.certificate, self.key = folder / f"{name}.crt", folder / f"{name}.key"
        self.certificate.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        private = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        self.key.write_bytes(key.private_bytes(*private))


def test_certificates_and_the_service_account_of_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TLS: the server is known by the kubeconfig's authority, and a user by a certificate too."""
    theirs, mine, other = (Certified(tmp_path, name) for name in ("server", "client", "other"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(theirs.certificate, theirs.key)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(mine.certificate)
    server = KubernetesServer(*DEFINITIONS)
    server._server.socket = tls.wrap_socket(server._server.socket, server_side=True)
    with server:
        path = tmp_path / "kubeconfig"
        monkeypatch.setenv("KUBECONFIG", str(path))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

        def written(authority: Certified, **user: Any) -> None:
            kubeconfig(server, path, token=server.token, **user)
            config = yaml.safe_load(path.read_text())
            config["clusters"][0]["cluster"] = {"server": server.url.replace("http:", "https:")}
            config["clusters"][0]["cluster"]["certificate-authority"] = str(authority.certificate)
            path.write_text(yaml.safe_dump(config))

        certified = {"client-certificate": str(mine.certificate), "client-key": str(mine.key)}
        written(theirs, **certified)
        assert target().find("demo", STORE) is None
        written(other, **certified)
        with pytest.raises(Unreachable, match=r"the connection is not secure: .*Is the certificate authority"):
            target().find("demo", STORE)
        written(theirs)
        with pytest.raises(Unreachable, match=r"the connection (broke|is not secure)"):
            target().find("demo", STORE)

        tls.verify_mode = ssl.CERT_NONE
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        with pytest.raises(UsageError, match="The pod's service account gives no way"):
            target().find("demo", STORE)
        (tmp_path / "token").write_text(server.token)
        monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
        monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(theirs.certificate))
        assert target().find("demo", STORE) is None


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    target().render(job())
    with pytest.raises(UsageError, match=r"pip install 'shardyard\[kube\]'"):
        target().find("demo", STORE)

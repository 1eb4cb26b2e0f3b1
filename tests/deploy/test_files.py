"""deploy/: images, compose, scripts, the launcher's file, the README, and that no secret stands in any of it."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.tools import DEPLOY, EXTRA, ROOT, files, named, program, run

DOCKERFILE = DEPLOY / "containers" / "Dockerfile"
COMPOSE = DEPLOY / "compose" / "compose.yaml"
SCRIPTS = files("**/*.sh", "**/*.sbatch")
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return found


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


# --- images


def test_the_dockerfile_is_clean() -> None:
    run(program("hadolint", EXTRA), "--failure-threshold", "info", DOCKERFILE)


def test_images_are_pinned_and_need_no_root_and_no_compiler() -> None:
    text = DOCKERFILE.read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE))
    outside = {base for base in bases if base not in stages and not base.startswith("torch-$")}
    assert outside and all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base) for base in outside)
    for target in ("shardyard", "mlflow"):
        assert re.search(rf"^FROM runtime AS {target}$", text, re.MULTILINE)
    runtime = text[text.index("AS runtime") :]
    assert re.search(r"^USER 1000:1000$", runtime, re.MULTILINE) and "USER root" not in text
    assert not re.search(r"\b(gcc|g\+\+|build-essential|apt-get)\b", text)
    assert 'ENTRYPOINT ["shardyard"]' in text.rpartition("FROM ")[2]
    for line in re.findall(r"pip install .*", text):
        assert "-c constraints.txt" in line or "--no-deps" in line, line
    assert set(re.findall(r"torch==([\w.]+)", text)) == {PINNED["torch"]}


def test_what_is_copied_is_let_through() -> None:
    """And nothing else: the ignore file begins with all."""
    first, *let = [
        line
        for line in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert first == "*"
    allowed = {line.removeprefix("!") for line in let if line.startswith("!")}
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE.read_text(), re.MULTILINE)
        for name in line.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_holds_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.removesuffix("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = set(re.findall(r"^COPY (\w+) \w+$", DOCKERFILE.read_text(), re.MULTILINE))
    assert packages == copied
    named_extras = re.findall(r'"\.\[([\w,]+)\]"', DOCKERFILE.read_text())
    assert set(",".join(named_extras).split(",")) <= project["project"]["optional-dependencies"].keys()
    version = project["project"]["version"]
    images = set(re.findall(r"shardyard(?:-mlflow)?:(\d[\d.]*\d)", "".join(path.read_text() for path in texts())))
    assert images == {version}


def test_the_driver_that_postgres_is_asked_through_is_installed() -> None:
    """SQLAlchemy's own choice for postgresql:// is another one."""
    uris = {uri for path in texts() for uri in re.findall(r"\bpostgresql[\w+]*://[\w@.:/]+", path.read_text())}
    assert uris and all(uri.startswith("postgresql+psycopg2://mlflow@") for uri in uris)  # and no password
    assert re.search(r"pip install .*\bpsycopg2-binary$", DOCKERFILE.read_text(), re.MULTILINE)
    pytest.importorskip("psycopg2", reason=f"needs psycopg2-binary: {EXTRA}")
    from sqlalchemy import make_url

    assert {make_url(uri).get_dialect().import_dbapi().__name__ for uri in uris} == {"psycopg2"}


# --- compose


def test_the_schema_takes_the_compose_file() -> None:
    run(program("check-jsonschema", EXTRA), "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_compose_listens_on_loopback_alone() -> None:
    ports = [port for service in services().values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_services_fit_together() -> None:
    top = compose()
    for name, service in services().items():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services()[needed], f"{name} waits for the health of {needed}"
        for secret in service.get("secrets", []):
            assert (secret if isinstance(secret, str) else secret["source"]) in top["secrets"]
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert (COMPOSE.parent / source).exists() if source.startswith(".") else source in top["volumes"]
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]+", service["image"]), service["image"]
        # What is read of /run/secrets was given.
        given = {secret if isinstance(secret, str) else secret["source"] for secret in service.get("secrets", [])}
        assert set(re.findall(r"/run/secrets/(\w+)", json.dumps(service))) <= given
    workers = [service for name, service in services().items() if name.startswith("worker")]
    assert len(workers) == 2 and all("--address=head:6379" in worker["entrypoint"] for worker in workers)
    assert all(service["environment"]["RAY_AUTH_MODE"] == "token" for service in [services()["head"], *workers])


def test_the_bucket_is_made_once() -> None:
    """The snippet of the service, against an S3 server."""
    moto = pytest.importorskip("moto", reason="needs moto: make setup")
    boto3 = pytest.importorskip("boto3", reason="needs boto3: make setup")
    (code,) = services()["bucket"]["command"]
    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", services()["bucket"]["environment"]["AWS_DEFAULT_REGION"])
        for _ in range(2):
            exec(code, {})
        assert [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]] == ["mlflow"]


def test_secrets_are_made_once_and_fit_together(tmp_path: Path) -> None:
    script = tmp_path / "make-secrets.sh"
    script.write_text((DEPLOY / "compose/make-secrets.sh").read_text())
    run("sh", script)
    folder = tmp_path / "secrets"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    made = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(made) == {Path(secret["file"]).name for secret in compose()["secrets"].values()}
    (identity,) = json.loads(made["s3_identities.json"])["identities"]
    (key,) = identity["credentials"]
    assert made["s3_credentials"].split("\n")[1:3] == [
        f"aws_access_key_id = {key['accessKey']}",
        f"aws_secret_access_key = {key['secretKey']}",
    ]
    tokens = [key["secretKey"], *(made[name] for name in ("ray_token", "postgres_password", "metrics_token"))]
    assert len(set(tokens)) == 4 and all(re.fullmatch(r"[0-9a-f]{64}", token) for token in tokens)
    run("sh", script)
    assert {path.name: path.read_text() for path in folder.iterdir()} == made
    (folder / "s3_credentials").unlink()  # one half alone would not fit
    run("sh", script)
    assert (folder / "s3_credentials").read_text() != made["s3_credentials"]
    assert (folder / "ray_token").read_text() == made["ray_token"]


# --- scripts, the launcher


@pytest.mark.parametrize("script", SCRIPTS, ids=map(named, SCRIPTS))
def test_scripts_are_clean(script: Path) -> None:
    run(program("shellcheck", f"{EXTRA}, or Debian: apt-get install shellcheck"), "--severity=style", script)


def test_rays_launcher_takes_the_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((DEPLOY / "ray/cluster.yaml").read_text()))
    validate_config(config)
    (kind,) = config["available_node_types"].values()
    assert kind["min_workers"] == len(config["provider"]["worker_ips"]) == config["max_workers"]
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = config[commands][-1]
        assert "RAY_AUTH_MODE=token" in start and "\n" not in start
    with pytest.raises(Exception, match="worker_start_ray_comands"):
        validate_config(config | {"worker_start_ray_comands": []})


def test_ray_knows_the_options_that_it_is_started_with() -> None:
    """In every file of deploy/: an option that this Ray has not got would be noticed only where it is started."""
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in (*parameter.opts, *parameter.secondary_opts)}
    starts = [
        match for path in texts() for match in re.findall(r"ray[ \"',]+start\b((?:[^\n]|\\\n)*)", path.read_text())
    ]
    starts += re.findall(r"RAY_OPTIONS.*", "".join(path.read_text() for path in files("systemd/*.env")))
    found = {option for text in starts for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", text)}
    assert {"--head", "--block", "--port", "--address", "--dashboard-host"} <= found
    assert found - known == set()


# --- all of it


def texts() -> list[Path]:
    return [path for path in DEPLOY.rglob("*") if path.is_file() and "secrets" not in path.parts]


def test_no_secret_stands_in_a_file() -> None:
    from trainer.redact import REDACTED, Redactor

    harmless = re.compile(r"\$|\{|/run/secrets|/etc/shardyard|CREDENTIALS_DIRECTORY|secrets/|automount|_token|~/")
    for path in texts():
        for line in path.read_text().splitlines():
            if path.suffix != ".md" and Redactor({}).text(line) != line and REDACTED not in line:
                assert harmless.search(line), f"{named(path)}: {line}"


def test_the_readme_takes_five_commands_at_most() -> None:
    text = (DEPLOY / "README.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    assert all(len(block.replace("\\\n", " ").splitlines()) <= 5 for block in blocks)
    kinds = {path.name for path in DEPLOY.iterdir() if path.is_dir()}
    assert {kind for kind in kinds if f"deploy/{kind}" not in text} == set()


def test_the_git_folder_never_holds_the_secrets() -> None:
    done = subprocess.run(
        ["git", "check-ignore", "deploy/compose/secrets/ray_token"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 or not (ROOT / ".git").exists()


def test_nothing_of_it_is_imported_or_installed() -> None:
    assert not list(DEPLOY.rglob("*.py"))
    assert os.access(DEPLOY / "compose/make-secrets.sh", os.X_OK)

"""What its documentation says of what it takes and refuses, the Kubernetes API server of the tests does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.kubernetes.client import (
    APPLY,
    MAPS,
    MERGE,
    RAYJOBS,
    TEMPLATE,
    Client,
    config_map,
    rayjob,
)
from tests.cluster.kubernetes.schema import check, fill, prune, read_definition
from tests.cluster.kubernetes_server import KubernetesServer

# Validation


@pytest.mark.parametrize(
    ("spec", "field", "reason", "message"),
    [
        (
            {"backoffLimit": "many"},
            "spec.backoffLimit",
            "FieldValueTypeInvalid",
            'Invalid value: "string": spec.backoffLimit in body must be of type integer: "string"',
        ),
        (
            {"rayClusterSpec": {"headGroupSpec": {"rayStartParams": {}}}},
            "spec.rayClusterSpec.headGroupSpec.template",
            "FieldValueRequired",
            "Required value",
        ),
        (
            {"deletionStrategy": {"onSuccess": {"policy": "No"}, "onFailure": {"policy": "DeleteSelf"}}},
            "spec.deletionStrategy.onSuccess.policy",
            "FieldValueNotSupported",
            'Unsupported value: "No": supported values: "DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"',
        ),
        (
            {"managedBy": "me"},
            "spec.managedBy",
            "FieldValueInvalid",
            "Invalid value: \"string\": the managedBy field value must be either 'ray.io/kuberay-operator' or"
            " 'kueue.x-k8s.io/multikueue'",
        ),
        (
            {"backoffLimit": 2**31},
            "spec.backoffLimit",
            "FieldValueInvalid",
            "Invalid value: 2147483648: spec.backoffLimit in body must be of type int32: 2147483648",
        ),
    ],
)
def test_what_the_definition_refuses(ask: Client, spec: Any, field: str, reason: str, message: str) -> None:
    status, answer = ask("POST", RAYJOBS, rayjob(**spec))
    assert (status, answer["reason"]) == (422, "Invalid")
    assert {"reason": reason, "message": message, "field": field} in answer["details"]["causes"]
    assert answer["message"].startswith('RayJob.ray.io "a" is invalid: ')
    assert f"{field}: {message}" in answer["message"]


def test_quantities_and_ports_in_a_pod_template(ask: Client) -> None:
    def with_cpu(cpu: Any) -> dict[str, Any]:
        container = {"name": "head", "resources": {"limits": {"cpu": cpu}}, "ports": [{"containerPort": 1}]}
        head = {"template": {"spec": {"containers": [container]}}}
        return rayjob("b", rayClusterSpec={"headGroupSpec": head | {"rayStartParams": {}}})

    assert ask("POST", RAYJOBS, with_cpu("much"))[0] == 422
    assert ask("POST", RAYJOBS, with_cpu(True))[0] == 422
    status, made = ask("POST", RAYJOBS, with_cpu(2))
    assert status == 201
    containers = made["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert containers[0]["ports"] == [{"containerPort": 1, "protocol": "TCP"}]
    assert made["spec"]["submissionMode"] == "K8sJobMode"


def test_an_immutable_field_stays(ask: Client) -> None:
    ask("POST", RAYJOBS, rayjob(managedBy="ray.io/kuberay-operator"))
    status, answer = ask("PATCH", f"{RAYJOBS}/a", {"spec": {"managedBy": "kueue.x-k8s.io/multikueue"}}, MERGE)
    assert (status, "the managedBy field is immutable" in answer["message"]) == (422, True)


def test_unknown_fields_are_refused_warned_of_or_dropped(ask: Client) -> None:
    body = rayjob(entrypiont="x", rayClusterSpec={"headGroupSpec": {"template": TEMPLATE | {"x": 1}}})
    status, answer = ask("POST", RAYJOBS, body, fieldValidation="Strict")
    assert (status, answer["reason"]) == (400, "BadRequest")
    assert answer["message"] == (
        'RayJob in version "v1" cannot be handled as a RayJob: strict decoding error: unknown field "spec.entrypiont",'
        ' unknown field "spec.rayClusterSpec.headGroupSpec.template.x"'
    )
    response = ask.open("POST", RAYJOBS, body)
    assert response.status == 201
    assert (response.headers.get_all("Warning") or [""])[0] == r'299 - "unknown field \"spec.entrypiont\""'
    assert "entrypiont" not in json.loads(response.read())["spec"]
    assert ask("POST", RAYJOBS, body, fieldValidation="Some")[0] == 422
    assert ask("POST", MAPS, config_map("c") | {"dta": {}}, fieldValidation="Strict")[0] == 400


def test_a_field_that_stands_there_twice(ask: Client) -> None:
    text = json.dumps(rayjob()).replace('"entrypoint": "x"', '"entrypoint": "x", "entrypoint": "y"')
    status, answer = ask("POST", RAYJOBS, text, fieldValidation="Strict")
    assert (status, answer["message"].endswith('duplicate field "spec.entrypoint"')) == (400, True)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("{", 400),
        ("[]", 400),
        ({"metadata": {"name": "a"}}, 400),
        (rayjob() | {"kind": "RayCluster"}, 400),
        (rayjob() | {"apiVersion": "ray.io/v1alpha1"}, 400),
        (rayjob() | {"metadata": {"name": "a", "namespace": "other"}}, 400),
        (rayjob() | {"metadata": {"name": "a", "labels": {"step": 5}}}, 400),
        (rayjob() | {"metadata": {"name": "a", "labels": {"run": "my run"}}}, 422),
        (rayjob() | {"metadata": {"name": "a", "labels": {"run": "r" * 64}}}, 422),
        (rayjob("My_Run"), 422),
        (rayjob(""), 422),
    ],
)
def test_bodies_that_are_refused(ask: Client, body: Any, code: int) -> None:
    status, answer = ask("POST", RAYJOBS, body)
    assert (status, answer["code"]) == (code, code)


def test_what_a_schema_says_of_each_value() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "set": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set", "maxItems": 2},
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "name": {"type": "string", "minLength": 2, "maxLength": 3, "pattern": "^a"},
            "when": {"type": "string", "format": "date-time", "nullable": True},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "texts": {"type": "object", "additionalProperties": {"type": "string"}},
            "count": {"type": "integer", "default": 3},
        },
    }
    right = {"set": ["a", "b"], "share": 1, "name": "ab", "when": None, "free": {"x": {}}, "texts": {"k": "v"}}
    assert check(right, schema) == []
    wrong = {"set": ["a", "a", "a"], "share": 2, "name": "b", "when": "now", "free": 1, "texts": {"k": 1}, "count": 0.5}
    fields = [cause.field for cause in check(wrong, schema)]
    assert fields == ["set", "set[1]", "set[2]", "share", "name", "when", "free", "texts.k", "count"]
    assert [cause.reason for cause in check({"name": "abcd"}, schema)] == ["FieldValueTooLong"]
    nulls: dict[str, Any] = {"set": None, "when": None, "count": None}
    fill(nulls, schema)
    assert nulls == {"when": None, "count": 3}
    loose: dict[str, Any] = {"x": 1, "free": {"y": 1}, "texts": {"z": "1"}}
    assert prune(loose, schema) == ["x"]
    assert loose == {"free": {"y": 1}, "texts": {"z": "1"}}


def test_a_definition_beyond_this_validator_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "crd.yaml"
    file.write_text("spec: {versions: [{schema: {openAPIV3Schema: {oneOf: []}}}]}")
    with pytest.raises(ValueError, match="oneOf"):
        read_definition(file)


# Server-side apply


def test_apply_creates_then_changes_and_forgets_what_it_no_longer_names(ask: Client) -> None:
    status, made = ask("PATCH", f"{MAPS}/c", config_map("c", a="1", b="2"), APPLY, fieldManager="one")
    assert (status, made["metadata"]["managedFields"][0]["fieldsV1"]) == (201, {"f:data": {"f:a": {}, "f:b": {}}})
    yaml = "{apiVersion: v1, kind: ConfigMap, metadata: {name: c}, data: {a: '3'}}"
    status, after = ask("PATCH", f"{MAPS}/c", yaml, APPLY, fieldManager="one")
    assert (status, after["data"]) == (200, {"a": "3"})
    assert ask("PATCH", f"{MAPS}/c", yaml, APPLY)[0] == 422


def test_apply_needs_the_right_to_create_where_there_is_nothing(server: KubernetesServer, ask: Client) -> None:
    server.deny("create", "configmaps")
    status, answer = ask("PATCH", f"{MAPS}/c", config_map("c"), APPLY, fieldManager="one")
    assert (status, "cannot create resource" in answer["message"]) == (403, True)


def test_apply_conflicts_with_other_managers_unless_forced(server: KubernetesServer, ask: Client) -> None:
    ask("PATCH", f"{MAPS}/c", config_map("c", a="1", b="1"), APPLY, fieldManager="one")
    server.patch("configmaps", "c", {"data": {"b": "2"}})
    theirs = config_map("c", a="2")
    status, answer = ask("PATCH", f"{MAPS}/c", theirs, APPLY, fieldManager="two")
    assert (status, answer["reason"]) == (409, "Conflict")
    assert answer["message"] == 'Apply failed with 1 conflict: conflict with "one": .data.a'
    cause = {"reason": "FieldManagerConflict", "message": 'conflict with "one"', "field": ".data.a"}
    assert answer["details"]["causes"] == [cause]
    both = ask("PATCH", f"{MAPS}/c", config_map("c", a="2", b="3"), APPLY, fieldManager="two")[1]["message"]
    assert both == (
        'Apply failed with 2 conflicts: conflicts with "controller" using v1:\n- .data.b\n'
        'conflicts with "one":\n- .data.a'
    )
    assert ask("PATCH", f"{MAPS}/c", theirs, APPLY, fieldManager="two", force="true")[1]["data"] == {"a": "2", "b": "2"}
    same = config_map("c", a="2", b="2")
    assert ask("PATCH", f"{MAPS}/c", same, APPLY, fieldManager="three")[0] == 200


def test_other_patches_are_not_known(ask: Client) -> None:
    status, answer = ask("PATCH", f"{MAPS}/c", {}, "application/strategic-merge-patch+json")
    assert (status, answer["reason"]) == (415, "UnsupportedMediaType")

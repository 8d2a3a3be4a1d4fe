"""The Kubernetes manifests: valid by the schemas, and in step with the services' own settings and Envoy's."""

from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.envoy import generate
from services.common.artifacts import TOKENIZER_BYTES_MAX
from services.common.config import SHARED_FIELDS
from tests.fixtures.manifests import (
    CONFIGS,
    KUBERNETES,
    container,
    environment,
    envoys_entrypoint,
    named,
    objects,
    places,
    pods,
    settings,
)

# The oldest release that its makers still mend.
RELEASE = "1.34"
SERVICES = tuple(CONFIGS)
WORKLOADS = (*(f"interlock-{service}" for service in SERVICES), "interlock-envoy", "interlock-redis")

(VARIANT,) = [variant for variant in generate.shipped() if variant.name == "kubernetes"]


def _workload(name: str) -> dict[str, Any]:
    return (named("Deployment") | named("StatefulSet"))[name]


@pytest.mark.parametrize(
    "document", tuple(objects()), ids=lambda found: f"{found['kind']}/{found['metadata']['name']}"
)
def test_each_object_is_valid(document: dict[str, Any]) -> None:
    """By Kubernetes' own schemas, strictly: an unknown field is an error."""
    kubernetes_validate.validate(document, RELEASE, strict=True)


def test_the_schemas_see_a_mistake() -> None:
    """A misspelt field and a wrong type are refused: the test above can fail."""
    wrong = named("Deployment")["interlock-gateway"]
    wrong["spec"]["replicaz"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, RELEASE, strict=True)


def test_kustomize_makes_one_mesh_of_it() -> None:
    """All is in one namespace, images have versions, and Envoy's files are those that are committed."""
    kubectl = shutil.which("kubectl") or shutil.which("kustomize")
    if kubectl is None:
        pytest.skip("neither kubectl nor kustomize is installed")
    command = [kubectl, "kustomize" if kubectl.endswith("kubectl") else "build", str(KUBERNETES)]
    built = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    made = list(yaml.safe_load_all(built))
    for found in made:
        kubernetes_validate.validate(found, RELEASE, strict=True)
        assert found["kind"] == "Namespace" or found["metadata"]["namespace"] == "interlock"
    (envoy,) = [one for one in made if one["metadata"]["name"].startswith("interlock-envoy-")]
    assert envoy["data"]["envoy.yaml"] == VARIANT.file.read_text()
    assert base64.b64decode(envoy["binaryData"]["interlock.binpb"]) == generate.DESCRIPTORS.read_bytes()
    assert "image: interlock-gateway:0" in built
    # Whoever mounts the config map follows its name.
    assert f"name: {envoy['metadata']['name']}" in built.replace("\n", " ").split("kind: Deployment", 1)[1]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_understands_its_environment(service: str) -> None:
    """The service's own reader takes every variable, and what must be told is told."""
    found = settings(service, environment(f"interlock-{service}"))
    assert found.id == f"interlock-{service}-0"
    ports = {port["name"]: port["containerPort"] for port in container(f"interlock-{service}")["ports"]}
    assert found.bind.rpartition(":")[2] == str(ports["grpc"])
    assert found.metrics_bind == f"0.0.0.0:{ports['metrics']}"
    host = found.bind.rpartition(":")[0]
    # A worker tells the mesh what it binds; the others are found by name.
    assert host == ("10.1.2.3" if service == "worker" else "0.0.0.0")  # noqa: S104 - a pod's own address


@pytest.mark.parametrize("service", SERVICES)
def test_what_a_service_keeps_has_a_volume(service: str) -> None:
    """The file system is read-only: each place of its settings is a mount of its own."""
    found = places(settings(service, environment(f"interlock-{service}")))
    mounts = {mount["mountPath"] for mount in container(f"interlock-{service}")["volumeMounts"]}
    assert found
    assert {str(place) for place in found} <= mounts


@pytest.mark.parametrize("service", ["gateway", "worker"])
def test_members_find_the_controller_by_its_service(service: str) -> None:
    """The address is the headless service's name and port, in the kustomization's namespace."""
    (address,) = settings(service, environment(f"interlock-{service}")).controllers
    host, _, port = address.partition(":")
    (own,) = named("Service")["interlock-controller"]["spec"]["ports"]
    assert host == "interlock-controller.interlock.svc.cluster.local"
    assert port == str(own["port"])


def test_envoy_finds_gateways_and_controllers_by_their_services() -> None:
    """What the configuration names are headless services of these manifests, with their ports."""
    services = named("Service")
    for endpoints in (VARIANT.parameters.gateways, VARIANT.parameters.controllers):
        (endpoint,) = endpoints
        name, _, rest = endpoint.host.partition(".")
        assert rest == "interlock.svc.cluster.local"
        assert services[name]["spec"]["clusterIP"] == "None"
        assert [port["port"] for port in services[name]["spec"]["ports"]] == [endpoint.port]


@pytest.mark.parametrize("name", WORKLOADS)
def test_services_lead_to_pods_and_ports_that_exist(name: str) -> None:
    """A service's selector is a workload's label, and its target is a port of the container."""
    service = named("Service")["interlock" if name == "interlock-envoy" else name]["spec"]
    workload = _workload(name)["spec"]
    assert service["selector"] == workload["selector"]["matchLabels"]
    assert service["selector"].items() <= workload["template"]["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in container(name)["ports"]}
    for port in service["ports"]:
        assert port["targetPort"] in ports
        assert name == "interlock-envoy" or port["port"] == ports[port["targetPort"]]


@pytest.mark.parametrize("name", ["interlock-gateway", "interlock-controller"])
def test_a_pod_has_room_for_the_largest_tokenizer(name: str) -> None:
    """It takes forty times its size while it is read; a pod without that much would be killed for it."""
    limit = container(name)["resources"]["limits"]["memory"]
    assert limit.endswith("Gi")
    assert int(limit.removesuffix("Gi")) << 30 >= 40 * TOKENIZER_BYTES_MAX + (1 << 30)


def test_a_worker_computes_with_the_cores_that_it_asks_for() -> None:
    """Whatever the node has: pods of one node would wait for one another's threads."""
    found = settings("worker", environment("interlock-worker"))
    assert str(found.threads) == container("interlock-worker")["resources"]["requests"]["cpu"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_pod_has_no_right_that_it_does_not_need(name: str) -> None:
    """Not root, nothing to gain, a read-only file system, no token of the cluster, bounded memory."""
    pod, one = pods()[name], container(name)
    assert pod["automountServiceAccountToken"] is False
    # With links, INTERLOCK_GATEWAY_PORT and its like would be in the environment and stop the start.
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert one["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert one["resources"]["limits"]["memory"]
    assert set(one["resources"]["requests"]) == {"cpu", "memory"}
    assert {"readinessProbe", "livenessProbe"} <= set(one)
    # NOT_SERVING is not dead: whoever drains or loads must not be killed for it.
    assert set(one["livenessProbe"]) & {"grpc", "httpGet"} == set()


def test_links_of_services_would_stop_a_start() -> None:
    """What the cluster would put into the environment is an unknown setting, and is refused by name."""
    linked = environment("interlock-gateway") | {"INTERLOCK_GATEWAY_PORT": "tcp://10.0.0.1:50051"}
    with pytest.raises(Exception, match="INTERLOCK_GATEWAY_PORT: unknown"):
        settings("gateway", linked)


def test_what_runs_twice_is_not_taken_down_at_once() -> None:
    """Every workload with replicas has a disruption budget that selects its pods."""
    budgets = [found["spec"] for found in named("PodDisruptionBudget").values()]
    for name in WORKLOADS:
        workload = _workload(name)["spec"]
        if workload["replicas"] > 1:
            (budget,) = [one for one in budgets if one["selector"] == workload["selector"]]
            assert budget["maxUnavailable"] == 1


def test_a_pod_may_drain_as_long_as_its_process_does() -> None:
    """The kubelet's patience is longer than the drain of the settings, or of Envoy's image."""
    gateway = settings("gateway", environment("interlock-gateway"))
    worker = settings("worker", environment("interlock-worker"))
    assert pods()["interlock-gateway"]["terminationGracePeriodSeconds"] > (
        gateway.drain_notice_s + gateway.drain_grace_s
    )
    assert pods()["interlock-worker"]["terminationGracePeriodSeconds"] > worker.drain_grace_s
    # The image drains once it is told to end; another beginning would not, and a hook would drain it twice.
    assert {"command", "lifecycle"} & set(container("interlock-envoy")) == set()
    _, admin_port, seconds, *_ = envoys_entrypoint()
    admin = yaml.safe_load(VARIANT.file.read_text())["admin"]["address"]["socket_address"]
    assert admin_port == str(admin["port_value"])
    assert pods()["interlock-envoy"]["terminationGracePeriodSeconds"] > int(seconds)


def test_envoys_pod_has_what_its_configuration_opens() -> None:
    """Ports, files, the variable in its name, and memory with room above its own bound."""
    parameters, one = VARIANT.parameters, container("interlock-envoy")
    ports = {port["name"]: port["containerPort"] for port in one["ports"]}
    assert parameters.probe is not None
    assert (ports["https"], ports["probe"]) == (parameters.listen.port, parameters.probe.port)
    assert one["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "probe"}
    mounts = {mount["name"]: mount["mountPath"] for mount in one["volumeMounts"]}
    assert parameters.certificate is not None
    assert parameters.certificate.secret == f"{mounts['configuration']}/certificate.yaml"
    assert parameters.descriptors == f"{mounts['configuration']}/interlock.binpb"
    assert parameters.certificate.directory == mounts["tls"]
    # A mount of single files would never show a renewed certificate.
    assert not [mount for mount in one["volumeMounts"] if "subPath" in mount]
    assert f"{mounts['configuration']}/envoy.yaml" in one["args"]
    assert parameters.instance == f"%ENVIRONMENT({one['env'][0]['name']})%"
    assert one["resources"]["limits"]["memory"] == "1Gi"
    assert parameters.heap_bytes_max <= 0.75 * 2**30


def test_the_network_lets_through_what_the_mesh_needs_and_no_more() -> None:
    """Each connection is allowed on both sides, to the port that the other one listens on."""
    rules = {name: found["spec"] for name, found in named("NetworkPolicy").items()}
    listening = {name: {port["containerPort"] for port in container(name)["ports"]} for name in WORKLOADS}
    out = {
        (name, _only_pod(target), port["port"])
        for name in WORKLOADS
        for rule in rules[name].get("egress", ())
        for target in rule["to"]
        for port in rule["ports"]
    }
    into = {
        (_only_pod(source), name, port["port"])
        for name in WORKLOADS
        for rule in rules[name]["ingress"]
        for source in rule.get("from", ())
        for port in rule["ports"]
    }
    assert out == into == {
        ("interlock-envoy", "interlock-gateway", 50051),
        ("interlock-envoy", "interlock-controller", 50052),
        ("interlock-gateway", "interlock-controller", 50052),
        ("interlock-gateway", "interlock-worker", 50061),
        ("interlock-gateway", "interlock-redis", 6379),
        ("interlock-worker", "interlock-controller", 50052),
        ("interlock-controller", "interlock-redis", 6379),
    }  # fmt: skip
    assert all(port in listening[target] for _, target, port in out)
    assert rules["interlock-default"]["podSelector"] == {}
    assert rules["interlock-default"]["policyTypes"] == ["Ingress", "Egress"]


def _only_pod(peer: dict[str, Any]) -> str:
    name: str = peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"]
    return name


def test_no_secret_is_in_a_file() -> None:
    """Secrets are made by their owner; the manifests know their names and keys alone, as the guide does."""
    assert not named("Secret")
    keys = {
        entry["valueFrom"]["secretKeyRef"]["key"]
        for name in WORKLOADS
        for entry in container(name).get("env", ())
        if "secretKeyRef" in entry.get("valueFrom", {})
    }
    guide = (KUBERNETES.parents[1] / "docs" / "operations.md").read_text()
    assert keys == {"mesh-token", "jwt-secret", "redis-url", "redis-password"}
    assert all(f"--from-literal={key}=" in guide for key in keys)
    # Workers check no token and reach no store: they are given neither.
    assert "INTERLOCK_JWT_SECRET" not in environment("interlock-worker")
    assert {"jwt_secret", "redis_url"} <= set(SHARED_FIELDS)


def test_a_workers_caches_fit_its_volume() -> None:
    """Downloads, forms, and one more while it is made: else rollouts end at a full disk."""
    found = settings("worker", environment("interlock-worker"))
    (claim,) = _workload("interlock-worker")["spec"]["volumeClaimTemplates"]
    volume = claim["spec"]["resources"]["requests"]["storage"]
    volume_bytes = int(volume.removesuffix("Gi")) << 30
    assert found.cache_dir == Path("/var/cache/interlock")
    assert found.cache_revisions_bytes + 2 * found.cache_forms_bytes < volume_bytes

"""The log pipeline's files: every field has a type that fits what the services and Envoy really log."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import yaml

from deploy.envoy.generate import bootstrap
from deploy.envoy.parameters import Parameters
from tests.fixtures.manifests import ROOT

ELK = ROOT / "deploy" / "elk"
# How a field gets into a line: `logs.annotate(...)`, a logger's methods, and what binds them.
LOGGING = {"annotate", "bind_contextvars", "critical", "debug", "emit", "error", "info", "log", "warning"}
NUMBERS = {"double", "long", "short"}


def _typed() -> dict[str, str]:
    template = json.loads((ELK / "index-template.json").read_text())
    fields = template["template"]["mappings"]["properties"]["interlock"]["properties"]
    return {name: told["type"] for name, told in fields.items()}


def _access_log() -> dict[str, str]:
    listener = bootstrap(Parameters())["static_resources"]["listeners"][0]
    manager: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    line: dict[str, str] = manager["access_log"][0]["typed_config"]["log_format"]["json_format"]
    return line


def _logged() -> set[str]:
    """The names that appear in the calls of the servers' code that log."""
    names = set()
    for service in ("common", "gateway", "worker", "controller"):
        for file in (ROOT / "services" / service).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                    called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                    if called in LOGGING:
                        names |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return names


def test_the_template_types_what_envoy_logs() -> None:
    """Each field of the access log has a type, numbers a number's; the moment goes where moments go."""
    typed = _typed()
    numbers = {
        "%RESPONSE_CODE%", "%DURATION%", "%RESPONSE_DURATION%", "%BYTES_RECEIVED%", "%BYTES_SENT%",
    }  # fmt: skip
    for name, form in _access_log().items():
        if name != "timestamp":
            assert (typed[name] in NUMBERS) == (form in numbers), name


def test_the_template_names_nothing_that_is_not_logged() -> None:
    """A field that was renamed in the code is renamed here."""
    of_the_format = {"level", "service", "instance", "event", "exception"}
    assert set(_typed()) - of_the_format <= _logged() | set(_access_log())


def test_numbers_are_numbers_for_searches_too() -> None:
    """What the services log with a unit in its name has a number's type where it has a type."""
    for name, kind in _typed().items():
        if re.search(r"_(ms|s|bytes|tokens)$", name):
            assert kind in NUMBERS, name


def test_ids_have_the_same_type_everywhere() -> None:
    """One search by `request_id` finds a request at Envoy, its gateway and its worker."""
    typed = _typed()
    for name in ("request_id", "worker_id", "gateway_id", "model", "revision", "service", "instance"):
        assert typed[name] == "keyword"


def test_filebeat_reads_our_lines_as_objects() -> None:
    """Plain YAML; each input decodes JSON under the name that the template types, and overwrites nothing."""
    settings = yaml.safe_load((ELK / "filebeat.yml").read_text())
    for found in settings["filebeat.inputs"]:
        steps = {
            name: told for step in found.get("parsers") or found["processors"] for name, told in step.items()
        }
        decoder = steps.get("ndjson") or steps["decode_json_fields"]
        assert decoder["target"] == "interlock"
        assert decoder["overwrite_keys"] is False
    assert len({found["id"] for found in settings["filebeat.inputs"]}) == 3
    assert "output.logstash" in settings
    assert "password" not in (ELK / "filebeat.yml").read_text()


def test_logstash_writes_where_the_template_waits() -> None:
    """The data stream's name matches the template's pattern; braces match, secrets come from outside."""
    text = re.sub(r"#.*", "", (ELK / "logstash.conf").read_text())
    parts = dict(re.findall(r'data_stream_(\w+) => "(\w+)"', text))
    template = json.loads((ELK / "index-template.json").read_text())
    name = f"{parts['type']}-{parts['dataset']}-{parts['namespace']}"
    (pattern,) = template["index_patterns"]
    assert re.fullmatch(pattern.replace("*", ".*"), name)
    assert text.count("{") == text.count("}")
    assert re.search(r'password => "\$\{ELASTICSEARCH_PASSWORD:\}"', text)
    assert re.findall(r"^(\w+) \{", text, re.MULTILINE) == ["input", "filter", "output"]

"""Fields in paths. Owns: which fields of a request its path names, as the contract's annotations have it.

The transcoder reads the query after the path, and what both name it takes from the query: the caller would
ask for one thing, and logs and proxies before this one would see another.
"""

from __future__ import annotations

import re

from google.api import annotations_pb2
from interlock.http.v1 import http_service_pb2

_VARIABLE = re.compile(r"\{(\w+)\}")


def path_fields() -> dict[str, tuple[str, ...]]:
    """What paths begin with before their first field, and their fields as a query can spell them."""
    found: dict[str, set[str]] = {}
    for service in http_service_pb2.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            rule = method.GetOptions().Extensions[annotations_pb2.http]
            for binding in (rule, *rule.additional_bindings):
                template = getattr(binding, binding.WhichOneof("pattern"))
                for name in _VARIABLE.findall(template):
                    names = found.setdefault(template.partition("{")[0], set())
                    names |= {name, method.input_type.fields_by_name[name].json_name}
    return {prefix: tuple(sorted(names)) for prefix, names in sorted(found.items())}

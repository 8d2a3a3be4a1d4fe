"""Which chat templates need no watch. Owns: the shapes whose cost is bounded by their size.

Must not know: how a template is rendered. What is not known here to be harmless is watched: most templates
with tools are, and it costs them a twentieth of a millisecond.
"""

from __future__ import annotations

from jinja2 import nodes

# A conversation's turns, the one thing that a plain template goes through, and it does so one turn at a time.
MESSAGES = "messages"
# With so much source, and so many turns, a plain template takes a few milliseconds at the very most.
PLAIN_CHARS_MAX = 8_192
PLAIN_MESSAGES_MAX = 64

# Each does no more than its operands are long. Nothing is assigned, so nothing grows from step to step.
_HARMLESS = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.If,
    nodes.CondExpr,
    nodes.Name,
    nodes.Const,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Add,
    nodes.Getattr,
    nodes.Getitem,
    nodes.Slice,
)
_FILTERS = frozenset({"trim", "length"})
_TESTS = frozenset({"defined", "none", "string", "true", "false", "in", "equalto"})
_FUNCTIONS = frozenset({"raise_exception"})


def is_plain(source: str, tree: nodes.Template) -> bool:
    """Whether a template only puts together the turns of a conversation, one after the other."""
    return len(source) <= PLAIN_CHARS_MAX and all(_is_plain(node, inside=False) for node in tree.body)


def _is_plain(node: nodes.Node, *, inside: bool) -> bool:
    if isinstance(node, nodes.For):
        if inside or node.recursive or not _is_turns(node.iter):
            return False
        inside = True
    elif not _is_harmless(node):
        return False
    return all(_is_plain(child, inside=inside) for child in node.iter_child_nodes())


def _is_turns(node: nodes.Node) -> bool:
    """`messages`, or a part of it such as `messages[1:]`."""
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Slice) and _is_turns(node.node)
    return isinstance(node, nodes.Name) and node.name == MESSAGES


def _is_harmless(node: nodes.Node) -> bool:
    match node:
        case nodes.Filter():
            return node.name in _FILTERS and node.node is not None
        case nodes.Test():
            return node.name in _TESTS
        case nodes.Call():
            return isinstance(node.node, nodes.Name) and node.node.name in _FUNCTIONS
    return isinstance(node, _HARMLESS)

"""YAML 1.1 without its surprises: `1e-3` is a number, 012 is none, and a key is there once."""

import re
from collections.abc import Callable
from typing import Any

import yaml

EXPONENT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value if key.value != "<<"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            problem = f"{twice[0][1]} is there twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node

    def construct_yaml_int(self, node: Any) -> Any:
        if re.fullmatch(r"[-+]?0[\d_]+|.*:.*", node.value):  # octal: 8; 1:30, in base 60: 90
            problem = f"{node.value}: write it as a decimal number, or quote it"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_yaml_int(node)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that the loader would take for a number."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for either in (_Loader, _Dumper):
    either.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def parse(text: str | bytes, where: object, kind: Callable[[str], Exception]) -> Any:
    """
    Args:
        where: what the text is from, for the message.
        kind: of the exception that is raised if it is not YAML, or reads in two ways.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # for `!!bool x`, its constructors raise whatever Python does
        said = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{where}: not YAML: {said}") from None


def to_text(value: Any) -> str:
    """YAML of plain values, in their order, from which `parse` gives them back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)

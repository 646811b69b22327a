"""YAML 1.1 without its surprises: `1e-3` is a number, 012 is none, and a key is there once."""

import re
from typing import Any

import yaml


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


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse(text: str | bytes) -> Any:
    """
    Raises:
        ValueError: it is not YAML, or reads in two ways; says why in one line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # for `!!bool x`, its constructors raise whatever Python does
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None

"""The templates of the pages, which lie beside this file, and pictures in pages."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

COARSE = 64  # from fewer pixels a side on, they are seen one by one


def render(template: str, **values: Any) -> str:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return templates.get_template(template).render(**values)


def picture_uri(picture: Image.Image) -> str:
    """An address that holds the whole RGB picture; a coarse one keeps its pixels as they are."""
    kind, file = "PNG" if max(picture.size) < COARSE else "JPEG", io.BytesIO()
    picture.save(file, kind, quality=90, subsampling=0)
    return data_uri(file.getvalue(), kind.lower())


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()

"""Every form of request is read, and what is none of them is refused with the reason."""

import json
from base64 import b64encode
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.messages import (
    MAX_PICTURES,
    Explain,
    Form,
    Found,
    RequestError,
    answer,
    parse,
    unwrapped,
)

FILE = b"\x89PNG some picture"
B64 = {"b64": b64encode(FILE).decode()}


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1], "datatype": "BYTES", "data": [B64["b64"]], **changes}


@pytest.mark.parametrize(
    ("body", "form", "count"),
    [
        (FILE, Form.ONE, 1),
        (B64, Form.ONE, 1),
        ({"instances": [B64] * 3}, Form.V1, 3),
        ({"inputs": [tensor()]}, Form.V2, 1),
        ({"inputs": [tensor(shape=[2, 1], data=[B64["b64"]] * 2)]}, Form.V2, 2),
    ],
)
def test_files_come_out_of_every_form(body: Any, form: Form, count: int) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = parse({"body": raw})
    assert request.form is form and list(request.pictures) == [FILE] * count


def test_a_multipart_upload_may_call_its_part_anything() -> None:
    assert list(parse({"photo": FILE}).pictures) == [FILE]


UPLOAD = (
    b'--x\r\nContent-Disposition: form-data; name="photo"; filename="name.png"\r\n\r\n'
    + FILE
    + b"\r\n--x--\r\n"
)


def test_an_upload_is_taken_apart_byte_for_byte() -> None:
    another = UPLOAD.replace(b"photo", b"other").removeprefix(b"--x")
    twice = UPLOAD.removesuffix(b"--\r\n") + another
    for boundary in ("x", '"x"'):
        kind = f"multipart/form-data; boundary={boundary}"
        assert unwrapped({"body": UPLOAD}, kind) == {"photo": FILE}
        assert unwrapped({"body": twice}, kind) == {"photo": FILE, "other": FILE}
    assert unwrapped({"body": UPLOAD}, None) == {"body": UPLOAD}


@pytest.mark.parametrize("body", [b"", b"x", b"--x", b"--x--", UPLOAD[:-6], UPLOAD[5:]])
def test_an_upload_that_is_cut_off_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="multipart: it is cut off"):
        unwrapped({"body": body}, "multipart/form-data; boundary=x")
    with pytest.raises(RequestError, match="multipart: its boundary is missing"):
        unwrapped({"body": UPLOAD}, "multipart/form-data")


@given(st.integers(0, len(UPLOAD)), st.binary(max_size=4), st.integers(0, 8))
def test_a_mutated_upload_is_read_or_refused(start: int, other: bytes, cut: int) -> None:
    body = UPLOAD[:start] + other + UPLOAD[start + cut :]
    try:
        parts = unwrapped({"body": body}, "multipart/form-data; boundary=x")
    except RequestError as error:
        assert str(error).startswith("multipart: ")
    else:
        assert all(isinstance(content, bytes) for content in parts.values())


@pytest.mark.parametrize("nested", [True, False])
def test_pixels_come_out_of_a_tensor(nested: bool) -> None:
    pixels = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    data = pixels.tolist() if nested else pixels.ravel().tolist()
    inputs = [tensor(shape=[2, 3, 4, 5], datatype="UINT8", data=data)]
    request = parse({"body": json.dumps({"inputs": inputs, "id": "a"}).encode()})
    assert request.id == "a"
    np.testing.assert_array_equal(np.stack(list(request.pictures)), pixels)


PIXEL = {"datatype": "UINT8", "shape": [1, 3, 1, 1]}


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"{", "not JSON"),
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        ({}, "send a picture"),
        ({"b64": 3}, "b64: a string"),
        ({"b64": "%%%"}, "b64: "),
        ({"b64": "ä"}, "b64: "),
        ({"instances": []}, "instances: a list of 1 to"),
        ({"instances": [B64] * (MAX_PICTURES + 1)}, "instances: a list of 1 to"),
        ({"instances": ["x"]}, "each is an object"),
        ({"inputs": {}}, "one tensor"),
        ({"inputs": [tensor(), tensor()]}, "one tensor"),
        ({"inputs": [tensor(shape=[2])]}, "does not fit"),
        ({"inputs": [tensor(shape="x")]}, "shape: a list of positive numbers"),
        ({"inputs": [tensor(shape=[True])]}, "shape: a list of positive numbers"),
        ({"inputs": [tensor(shape=[])]}, "pictures are needed"),
        ({"inputs": [tensor(shape=[10**6])]}, "pictures are needed"),
        ({"inputs": [tensor(data="x")]}, "data: a list"),
        ({"inputs": [tensor(datatype="FP32")]}, "datatype: BYTES"),
        ({"inputs": [tensor()], "id": 3}, "id: a string"),
        ({"inputs": [tensor(**{**PIXEL, "shape": [1, 1, 1, 1]}, data=[1])]}, r"\[N, 3, "),
        ({"inputs": [tensor(**{**PIXEL, "shape": [1, 3, 10**5, 10**5]}, data=[1])]}, "pixels"),
        ({"inputs": [tensor(**PIXEL, data=[1, 2])]}, "does not fit"),
        ({"inputs": [tensor(**PIXEL, data=[[1], 2, 3])]}, "does not fit"),
        ({"inputs": [tensor(**PIXEL, data=[1, 2, 256])]}, "0 to 255"),
        ({"inputs": [tensor(**PIXEL, data=[1, 2, -1])]}, "0 to 255"),
        ({"inputs": [tensor(**PIXEL, data=[1, 2, 0.5])]}, "0 to 255"),
        ({"inputs": [tensor(**PIXEL, data=[1, 2, 10**30])]}, "0 to 255"),
    ],
)
def test_what_is_no_request_is_refused_with_the_reason(body: Any, complaint: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError, match=complaint):
        parse({"body": raw})


def test_two_parts_are_one_too_many() -> None:
    with pytest.raises(RequestError, match="one picture is needed"):
        parse({"a": FILE, "b": FILE})


@pytest.mark.parametrize("top", ["0", "-1", "x", "1.5", "9" * 30, "²"])
def test_a_count_that_is_none_is_refused(top: str) -> None:
    with pytest.raises(RequestError, match="a number from 1 to 1000"):
        parse({"body": FILE}, top)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["inputs", "instances", "b64", "id", "shape", "data", "datatype"])
            | st.text(),
            inner,
            max_size=5,
        )
    ),
)


@given(st.dictionaries(st.sampled_from(["inputs", "instances", "b64", "id"]), JSON))
def test_no_json_gets_anything_but_a_request_or_a_refusal(body: dict[str, Any]) -> None:
    try:
        request = parse({"body": json.dumps(body).encode()})
    except RequestError as error:
        assert str(error)
    else:
        assert 1 <= len(request.pictures) <= MAX_PICTURES


@pytest.mark.parametrize("share", ["-0.1", "1", "x", "nan", "inf", "²"])
def test_a_share_that_is_none_is_refused(share: str) -> None:
    with pytest.raises(RequestError, match=f"abstain={share}: a number from 0 to below 1"):
        parse({"body": FILE}, None, share)
    with pytest.raises(RequestError, match=f"confidence={share}: a number from 0 to below 1"):
        parse({"body": FILE}, None, None, share)


MODEL = {"name": "m", "version": "1"}
CLASSES = ["a", "b", "c"]
FOUND = Found(np.array([[0.1, 0.6, 0.3]], np.float32), np.array([0.05]))


@pytest.mark.parametrize(("abstain", "label"), [("", "b"), ("0.04", "b"), ("0.05", None)])
def test_an_unfamiliar_picture_gets_no_label_where_that_is_wanted(
    abstain: str, label: str | None
) -> None:
    one = answer(parse({"body": FILE}, None, abstain), FOUND, CLASSES, MODEL)
    assert one["label"] == label and one["probability"] == pytest.approx(0.6)
    assert one["familiarity"] == 0.05 and one["top"][0]["label"] == "b"
    assert one.get("reason") == (None if label else "unfamiliar")
    body = json.dumps({"inputs": [tensor()]}).encode()
    v2 = answer(parse({"body": body}, None, abstain), FOUND, CLASSES, MODEL)
    outputs = {output["name"]: output["data"] for output in v2["outputs"]}
    assert outputs["label"] == [label or ""] and outputs["familiarity"] == [0.05]


@pytest.mark.parametrize(("least", "members"), [(0.0, "bca"), (0.2, "bc"), (0.6, "b"), (0.9, "b")])
def test_a_set_has_the_likely_classes_and_always_the_likeliest(least: float, members: str) -> None:
    one = answer(parse({"body": FILE}), FOUND, CLASSES, MODEL, least)
    assert "".join(one["set"]) == members
    body = json.dumps({"inputs": [tensor()]}).encode()
    last = answer(parse({"body": body}), FOUND, CLASSES, MODEL, least)["outputs"][-1]
    assert (last["name"], last["datatype"], last["shape"]) == ("set", "BOOL", [1, 3])
    assert last["data"] == [label in members for label in CLASSES]


EXPLAINED = replace(FOUND, maps=np.array([[[0.5, -1]]], np.float32))


def test_an_explanation_has_the_likeliest_class_where_it_is_asked_for() -> None:
    many = {"body": json.dumps({"instances": [B64]}).encode()}
    v2 = {"body": json.dumps({"inputs": [tensor()]}).encode()}
    for row in ({"body": FILE}, many, v2):
        without = answer(parse(row), FOUND, CLASSES, MODEL)
        assert answer(parse(row), EXPLAINED, CLASSES, MODEL) == without
    expected = {"label": "b", "map": [[0.5, -1]]}
    one = answer(
        parse({"body": FILE}, abstain="0.1", explain=Explain.MAP), EXPLAINED, CLASSES, MODEL
    )
    assert one["label"] is None and one["explanation"] == expected
    several = answer(parse(many, explain=Explain.MAP), EXPLAINED, CLASSES, MODEL)
    assert several["predictions"][0]["explanation"] == expected
    last = answer(parse(v2, explain=Explain.MAP), EXPLAINED, CLASSES, MODEL)["outputs"][-1]
    assert last == {"name": "map", "datatype": "FP32", "shape": [1, 1, 2], "data": [0.5, -1]}
    for row in (many, v2):
        with pytest.raises(RequestError, match="several are explained in JSON"):
            parse(row, explain=Explain.PICTURE)


def test_an_answer_names_as_many_classes_as_were_asked_for() -> None:
    one = answer(parse({"body": FILE}, "2"), FOUND, CLASSES, MODEL)
    assert [entry["label"] for entry in one["top"]] == ["b", "c"] and one["label"] == "b"
    request = parse({"body": json.dumps({"inputs": [tensor()], "id": "7"}).encode()})
    v2 = answer(request, FOUND, CLASSES, MODEL)
    assert v2["id"] == "7" and v2["model_version"] == "1"
    assert v2["outputs"][0] == {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["b"]}
    assert v2["outputs"][1]["shape"] == [1, 3]

"""Every form of request is read, and what is none of them is refused with the reason."""

import json
import math
import tracemalloc
from base64 import b64encode
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.messages import (
    MAX_PICTURES,
    Dialect,
    Explain,
    Found,
    Request,
    RequestError,
    answer,
    failure,
    parse,
    softmax,
    unwrapped,
)

FILE = b"\x89PNG some picture"
B64 = {"b64": b64encode(FILE).decode()}


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1], "datatype": "BYTES", "data": [B64["b64"]], **changes}


@pytest.mark.parametrize(
    ("body", "dialect", "count"),
    [
        (FILE, Dialect.ONE, 1),
        (B64, Dialect.ONE, 1),
        ({"instances": [B64] * 3}, Dialect.V1, 3),
        ({"inputs": [tensor()]}, Dialect.V2, 1),
        ({"inputs": [tensor(shape=[2, 1], data=[B64["b64"]] * 2)]}, Dialect.V2, 2),
    ],
)
def test_files_come_out_of_every_dialect(body: Any, dialect: Dialect, count: int) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = parse({"body": raw})
    assert request.dialect is dialect and list(request.pictures) == [FILE] * count


def test_what_would_take_far_more_memory_than_it_has_bytes_is_not_read() -> None:
    for bomb in (b"{}," * 100_000, b"[]," * 100_000, b'"",' * 50_001):
        with pytest.raises(RequestError, match=r"^JSON: over 100,000 brackets, braces and quotes$"):
            parse({"body": b'{"instances": [' + bomb + b"1]}"})
    parts = b'--x\r\nContent-Disposition: form-data; name="data"\r\n\r\n\r\n' * 101 + b"--x--"
    with pytest.raises(RequestError, match=r"^multipart: over 100 parts$"):
        unwrapped({"body": parts}, "multipart/form-data; boundary=x")


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
    with pytest.raises(RequestError, match=r"^multipart: it is cut off$"):
        unwrapped({"body": body}, "multipart/form-data; boundary=x")
    with pytest.raises(RequestError, match=r"^multipart: its boundary is missing$"):
        unwrapped({"body": UPLOAD}, "multipart/form-data")


def test_a_part_has_a_name_of_its_own_and_a_blank_line() -> None:
    kind = "multipart/form-data; Boundary=x"
    for part in (UPLOAD.replace(b"; name=", b"; xname="), b"--x\r\nname=\r\n--x--"):
        with pytest.raises(RequestError, match=r"^multipart: a part has no name$"):
            unwrapped({"body": part}, kind)
    with pytest.raises(RequestError, match=r"^multipart: a part has no name$"):
        unwrapped({"body": UPLOAD.replace(b"\r\n\r\n", b"\r\n")}, kind)
    assert unwrapped({"body": UPLOAD.replace(b"photo", b"\xff")}, kind) == {"\ufffd": FILE}
    blank = UPLOAD.replace(FILE, FILE + b"\r\n\r\n" + FILE)
    assert unwrapped({"body": blank}, kind) == {"photo": FILE + b"\r\n\r\n" + FILE}


def test_a_name_may_stand_without_quotes_as_dotnet_writes_it() -> None:
    kind = "multipart/form-data; boundary=x"
    bare = UPLOAD.replace(b'"photo"', b"photo")
    assert bare != UPLOAD and unwrapped({"body": bare}, kind) == {"photo": FILE}


def test_two_pictures_of_one_name_are_too_many() -> None:
    twice = UPLOAD.replace(b"--x--", UPLOAD)
    with pytest.raises(RequestError, match=r"^multipart: one picture is needed"):
        unwrapped({"body": twice}, "multipart/form-data; boundary=x")


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
WHOLE = "data: whole numbers from 0 to 255 are needed$"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"{", "not JSON: Expecting property"),
        (b'{"a": ' + b"[" * 50_000, "not JSON: maximum recursion"),
        (
            {},
            r'send a picture, \{"b64": …\}, \{"instances": \[\{"b64": …\}\]\} or \{"inputs": …\}$',
        ),
        ({"b64": 3}, "b64: a string is needed$"),
        ({"b64": "%%%"}, "b64: Only base64 data"),
        ({"b64": "ä"}, "b64: string argument should contain only ASCII"),
        ({"instances": []}, "instances: a list of 1 to 64 is needed$"),
        ({"instances": [B64] * (MAX_PICTURES + 1)}, "instances: a list of 1 to 64 is needed$"),
        ({"instances": {"b64": "x"}}, "instances: a list of 1 to 64 is needed$"),
        ({"instances": ["b64"]}, 'instances: each is an object {"b64": "…"}$'),
        ({"instances": [{"other": 1}]}, 'instances: each is an object {"b64": "…"}$'),
        ({"instances": [B64, "x"]}, 'instances: each is an object {"b64": "…"}$'),
        ({"inputs": {}}, "inputs: a list of one tensor is needed$"),
        ({"inputs": []}, "inputs: a list of one tensor is needed$"),
        ({"inputs": ["x"]}, "inputs: a list of one tensor is needed$"),
        ({"inputs": [tensor(), tensor()]}, "inputs: a list of one tensor is needed$"),
        ({"inputs": [tensor(shape=[2])]}, r"shape: \[2\] does not fit the 1 pictures of data$"),
        ({"inputs": [tensor(shape=[2, 1])]}, r"shape: \[2, 1\] does not fit the 1 pictures"),
        (
            {"inputs": [tensor(shape=[1, 2], data=[B64["b64"]] * 2)]},
            r"shape: \[1, 2\] does not fit the 2 pictures of data$",
        ),
        (
            {"inputs": [tensor(shape=[2, 2], data=[B64["b64"]] * 2)]},
            r"shape: \[2, 2\] does not fit the 2 pictures of data$",
        ),
        ({"inputs": [tensor(shape="x")]}, "shape: a list of positive numbers is needed$"),
        ({"inputs": [tensor(shape=[True])]}, "shape: a list of positive numbers is needed$"),
        ({"inputs": [tensor(shape=[0])]}, "shape: a list of positive numbers is needed$"),
        ({"inputs": [tensor(shape=[1, -1])]}, "shape: a list of positive numbers is needed$"),
        ({"inputs": [{"data": []}]}, "shape: a list of positive numbers is needed$"),
        ({"inputs": [tensor(shape=[1] * 5)]}, "shape: at most 4 numbers, none over 25,000,000$"),
        ({"inputs": [tensor(shape=[1, 10**4000])]}, "shape: at most 4 numbers, none over 25,"),
        ({"inputs": [tensor(shape=[])]}, "shape: 1 to 64 pictures are needed$"),
        ({"inputs": [tensor(shape=[MAX_PICTURES + 1])]}, "shape: 1 to 64 pictures are needed$"),
        ({"inputs": [tensor(data="x")]}, "data: a list is needed$"),
        (
            {"inputs": [tensor(datatype="FP32")]},
            r"datatype: BYTES \(base64 of a picture\) or UINT8 \(pixels\) is needed$",
        ),
        ({"inputs": [tensor(datatype=[])]}, "datatype: BYTES"),
        ({"inputs": [tensor(datatype={})]}, "datatype: BYTES"),
        ({"inputs": [tensor()], "id": 3}, "id: a string is needed$"),
        ({"inputs": [tensor()], "id": "\ud800"}, "id: a string is needed$"),
        (
            {"inputs": [tensor(**{**PIXEL, "shape": [1, 1, 1, 1]}, data=[1])]},
            r"shape: \[N, 3, height, width\] is needed, not \[1, 1, 1, 1\]$",
        ),
        (
            {"inputs": [tensor(**{**PIXEL, "shape": [1, 3, 1]}, data=[1, 2, 3])]},
            r"shape: \[N, 3, height, width\] is needed, not \[1, 3, 1\]$",
        ),
        (
            {"inputs": [tensor(**{**PIXEL, "shape": [1, 3, 10**5, 10**5]}, data=[1])]},
            "shape: over 25,000,000 pixels$",
        ),
        ({"inputs": [tensor(**PIXEL, data=[1, 2])]}, r"data: \[1, 3, 1, 1\] does not fit it$"),
        ({"inputs": [tensor(**PIXEL, data=[1, 2, 3, 4])]}, "data: .* does not fit it$"),
        ({"inputs": [tensor(**PIXEL, data=[])]}, "data: .* does not fit it$"),
        ({"inputs": [tensor(**PIXEL, data=[[]])]}, "data: .* does not fit it$"),
        ({"inputs": [tensor(**PIXEL, data=[[1], 2, 3])]}, WHOLE),
        ({"inputs": [tensor(**PIXEL, data=[[[[[1]]], [[[2]]], [[[3]]]]])]}, WHOLE),
        ({"inputs": [tensor(**PIXEL, data=[[1, 2], "3"])]}, WHOLE),
        ({"inputs": [tensor(**PIXEL, data=[{"1": 2}])]}, WHOLE),
        ({"inputs": [tensor(**PIXEL, data=[1, 2, 256])]}, WHOLE),
        ({"inputs": [tensor(**PIXEL, data=[1, 2, -1])]}, WHOLE),
        ({"inputs": [tensor(**PIXEL, data=[1, 2, 0.5])]}, WHOLE),
        ({"inputs": [tensor(**PIXEL, data=[1, 2, 3.0])]}, WHOLE),
        ({"inputs": [tensor(**PIXEL, data=[1, 2, None])]}, WHOLE),
        ({"inputs": [tensor(**PIXEL, data=[1, 2, True])]}, WHOLE),
        ({"inputs": [tensor(**PIXEL, data=[1, 2, 10**30])]}, WHOLE),
    ],
)
def test_what_is_no_request_is_refused_with_the_reason(body: Any, complaint: str) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError, match=f"^{complaint}"):
        parse({"body": raw})


def test_as_much_as_is_allowed_is_taken() -> None:
    def read(content: Any) -> Request:
        return parse({"body": json.dumps(content).encode()})

    many = [B64["b64"]] * MAX_PICTURES
    assert list(read({"instances": [B64] * MAX_PICTURES}).pictures) == [FILE] * MAX_PICTURES
    whole = read({"inputs": [tensor(shape=[MAX_PICTURES], data=many)]})
    assert len(whole.pictures) == MAX_PICTURES and whole.id is None
    extremes = read({"inputs": [tensor(**PIXEL, data=[0, 255, 0])]})
    assert np.ravel(extremes.pictures[0]).tolist() == [0, 255, 0]
    assert extremes.pictures[0].dtype == np.uint8  # type: ignore[union-attr]


@pytest.mark.parametrize("nested", [True, False])
def test_a_long_text_among_numbers_takes_no_more_memory_than_itself(nested: bool) -> None:
    """As an array of texts, each number would take as much."""
    numbers = [*range(250)] * 4
    data = [numbers, "a" * 1_000_000] if nested else [*numbers, "a" * 1_000_000]
    body = {"inputs": [tensor(shape=[1, 3, 100, 100], datatype="UINT8", data=data)]}
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match=f"^{WHOLE}"):
            parse({"body": body})
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_no_side_of_a_tensor_is_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.messages.MAX_PIXELS", 6)
    for shape in ([1, 3, 1, 6], [1, 3, 6, 1]):
        pixels = tensor(shape=shape, datatype="UINT8", data=[7] * 18)
        request = parse({"body": json.dumps({"inputs": [pixels]}).encode()})
        assert list(np.shape(request.pictures[0])) == shape[1:]


def test_a_tensor_has_as_many_pixels_as_a_picture_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.messages.MAX_PIXELS", 6)
    for width, fits in ((2, True), (3, False)):
        shape = [1, 3, 3, width]
        pixels = tensor(shape=shape, datatype="UINT8", data=[7] * math.prod(shape))
        body = {"body": json.dumps({"inputs": [pixels]}).encode()}
        if fits:
            assert np.shape(parse(body).pictures[0]) == (3, 3, 2)
        else:
            with pytest.raises(RequestError, match=r"^shape: over 6 pixels$"):
                parse(body)


def test_a_body_is_read_as_it_comes() -> None:
    assert list(parse({"body": bytearray(FILE)}).pictures) == [FILE]
    assert list(parse({"body": B64}).pictures) == [FILE], "TorchServe has read it already"
    spaced = b" \n" + json.dumps({"instances": [B64]}).encode()
    assert parse({"body": spaced}).dialect is Dialect.V1
    assert list(parse({"body": FILE, "other": b"x"}).pictures) == [FILE]
    for nothing in ({}, {"body": "text"}, {"a": FILE, "b": FILE}):
        with pytest.raises(RequestError) as caught:
            parse(nothing)
        assert str(caught.value) == "one picture is needed; several go into JSON as instances"


def test_a_request_has_what_its_options_say() -> None:
    plain = parse({"body": FILE})
    assert plain == Request([FILE], Dialect.ONE, top=5, abstain=0.0, confidence=None, explain=None)
    given = parse({"body": FILE}, "1000", "0", "0.999", explain=Explain.PICTURE)
    assert given == Request(
        [FILE], Dialect.ONE, top=1000, abstain=0.0, confidence=0.999, explain=Explain.PICTURE
    )
    assert parse({"body": FILE}, "1", "0.25", "0").top == 1
    assert parse({"body": FILE}, "1", "0.25", "0").abstain == 0.25
    assert parse({"body": FILE}, "1", "0.25", "0").confidence == 0


@pytest.mark.parametrize("top", ["0", "-1", "x", "1.5", "1001", "9" * 30, "²"])
def test_a_count_that_is_none_is_refused(top: str) -> None:
    with pytest.raises(RequestError, match=f"^top={top[:20]}: a number from 1 to 1000 is needed$"):
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


@pytest.mark.parametrize("share", ["-0.1", "1", "x", "nan", "inf", "²", "x" * 30])
def test_a_share_that_is_none_is_refused(share: str) -> None:
    needed = f"={share[:20]}: a number from 0 to below 1 is needed$"
    with pytest.raises(RequestError, match=f"^abstain{needed}"):
        parse({"body": FILE}, None, share)
    with pytest.raises(RequestError, match=f"^confidence{needed}"):
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


def test_an_answer_is_whole() -> None:
    one = answer(parse({"body": FILE}, "2", "0.1"), FOUND, CLASSES, MODEL, 0.2)
    assert one == {
        "label": None,
        "probability": pytest.approx(0.6),
        "familiarity": 0.05,
        "top": [
            {"label": "b", "probability": pytest.approx(0.6)},
            {"label": "c", "probability": pytest.approx(0.3)},
        ],
        "model": MODEL,
        "reason": "unfamiliar",
        "set": ["b", "c"],
    }
    body = json.dumps({"inputs": [tensor()]}).encode()
    plain = answer(parse({"body": body}), Found(FOUND.probabilities, None), CLASSES, MODEL)
    assert plain == {
        "model_name": "m",
        "model_version": "1",
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["b"]},
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": [1, 3],
                "data": pytest.approx([0.1, 0.6, 0.3]),
            },
        ],
    }
    whole = answer(parse({"body": body}), FOUND, CLASSES, MODEL)["outputs"]
    assert whole[2] == {"name": "familiarity", "datatype": "FP64", "shape": [1], "data": [0.05]}


def test_pictures_of_one_request_are_answered_each_for_itself() -> None:
    rows = np.array([[0.1, 0.6, 0.3], [0.4, 0.4, 0.2], [0.2, 0.2, 0.6]], np.float32)
    maps = np.arange(6, dtype=np.float32).reshape(3, 1, 2)
    found = Found(rows, np.array([0.5, 0.05, 0.2]), np.array([1, 9, 4], np.float32), maps)
    body = {"body": json.dumps({"instances": [B64] * 3}).encode()}
    request = parse(body, None, "0.1", explain=Explain.MAP)
    answers = answer(request, found, CLASSES, MODEL)["predictions"]
    assert [one["label"] for one in answers] == ["b", None, "c"]
    assert [one["familiarity"] for one in answers] == [0.5, 0.05, 0.2]
    assert [one["top"][0]["label"] for one in answers] == ["b", "a", "c"], "the first of equals"
    assert [one["explanation"]["map"] for one in answers] == maps.tolist()
    last = found.part(1, 3)
    assert last.probabilities.tolist() == rows[1:].tolist()
    assert last.familiarity is not None and last.familiarity.tolist() == [0.05, 0.2]
    assert last.strangeness is not None and last.strangeness.tolist() == [9, 4]
    assert last.maps is not None and last.maps.tolist() == maps[1:].tolist()
    bare = Found(rows, None).part(0, 1)
    assert (bare.familiarity, bare.strangeness, bare.maps) == (None, None, None)


def test_each_pictures_set_has_its_own_likeliest_class() -> None:
    two = Found(np.array([[0.05, 0.9, 0.05], [0.3, 0.3, 0.4]], np.float32), None)
    body = json.dumps({"inputs": [tensor(shape=[2], data=[B64["b64"]] * 2)]}).encode()
    last = answer(parse({"body": body}), two, CLASSES, MODEL, 0.8)["outputs"][-1]
    assert last["data"] == [False, True, False, False, False, True]


def test_without_familiarity_no_picture_is_strange() -> None:
    one = answer(
        parse({"body": FILE}, None, "0.9"), Found(FOUND.probabilities, None), CLASSES, MODEL
    )
    assert one["label"] == "b" and one["familiarity"] is None and "reason" not in one


def test_probabilities_are_shares_of_exponentials_however_large() -> None:
    logits = np.log(np.array([[1, 3], [4, 1]], np.float32)) + np.float32(1000)
    assert softmax(logits) == pytest.approx(np.array([[0.25, 0.75], [0.8, 0.2]]), abs=1e-3)
    far_apart = np.array([[1000, 1000], [-1000, -1000]], np.float32)
    assert softmax(far_apart) == pytest.approx(np.full((2, 2), 0.5)), "each row by itself"
    assert failure("some", "text") == {"error": {"code": "some", "message": "text"}}

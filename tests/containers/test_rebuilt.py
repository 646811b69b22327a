"""Two builds of one commit have the same files. `make test-images`.

Compared are Debian's packages and our own, which are built from nothing in a minute. The Python
packages are compiled as our own is; docs/operations.md has what a comparison of whole images found.
"""

import engine
import pytest

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(engine.BUILDS),
    pytest.mark.skipif(not engine.available(), reason="needs root, podman, buildah, mmdebstrap"),
]


@pytest.mark.parametrize(
    ("target", "folders", "typical"),
    [
        ("service", ["."], "usr/bin/java"),
        ("package", ["opt/job", "opt/service"], "opt/job/jobs/__pycache__/cli.cpython-311.pyc"),
    ],
)
def test_two_builds_have_the_same_files(target: str, folders: list[str], typical: str) -> None:
    engine.prepare()
    found, layers = [], []
    for _ in range(2):
        image = engine.build(target, fresh=True)
        found.append(engine.files(image, *folders))
        layers.append(engine.layers(image))
        engine.podman("rmi", image)
    first, second = found
    assert typical in first
    assert not sorted(
        name for name in first.keys() | second.keys() if first.get(name) != second.get(name)
    )
    assert layers[0] == layers[1] or target == "package", "which has pip, too"

"""Signatures of archives: ECDSA with P-256 and SHA-256 in base64, beside the archive as `.sig`.

`cosign verify-blob --key` and `openssl dgst -verify` read the same, and any P-256 key pair in PEM
will do. Needs the package `cryptography`, and so is imported only where something is signed.
"""

import base64
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from serving.archive import ModelError
from serving.files import digest_of

ALGORITHM = ec.ECDSA(Prehashed(SHA256()))


def sign(archive: Path, private_key: Path) -> bytes:
    """The signature of a file, by a key without a passphrase.

    Raises:
        ModelError: there is no such key, or it is of another kind.
    """
    try:
        key = load_pem_private_key(private_key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{private_key}: no private key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ModelError(f"{private_key}: a key of the curve P-256 is needed")
    return base64.b64encode(key.sign(bytes.fromhex(digest_of(archive)), ALGORITHM))


def verify(archive: Path, signature: bytes, public_key: Path) -> None:
    """
    Raises:
        ModelError: there is no such key, or the signature is not this file's by its owner.
    """
    try:
        key = load_pem_public_key(public_key.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{public_key}: no public key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ModelError(f"{public_key}: a key of the curve P-256 is needed")
    try:
        given = base64.b64decode(signature, validate=True)
        key.verify(given, bytes.fromhex(digest_of(archive)), ALGORITHM)
    except (InvalidSignature, ValueError):
        raise ModelError(f"{archive}: its signature is not by the owner of {public_key}") from None

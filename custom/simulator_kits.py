"""Keys and certificates of a simulated federation, in the form of NVFlare's provisioned kits.

The simulator has no certificates, and secure aggregation does not run without: whoever could answer for another site
could take its masks. Real federations use the kits that provisioning made and never this.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from custom.atomic import write_atomically
from custom.site_sessions import CERTIFICATE_FILE, KEY_FILE, ROOT_FILE

VALID_DAYS = 360
SITE_FILES = (ROOT_FILE, KEY_FILE, CERTIFICATE_FILE)


def make_kits(server: Path, sites: Mapping[str, Path], *, force: bool = False) -> list[Path]:
    """Write a root's certificate into every kit, and key and certificate into each site's. The root's key is dropped.

    Args:
        server: folder of the server's kit.
        sites: folder of each site's kit, by the site's name.
        force: replace kits that are whole; without, they are kept, all or none.

    Returns:
        The folders written.
    """
    wanted = [server / ROOT_FILE, *(kit / name for kit in sites.values() for name in SITE_FILES)]
    if not force and all(file.is_file() for file in wanted):
        return []
    root_key = _new_key()
    root = _certificate("simulated federation", root_key, issuer="simulated federation", issuer_key=root_key)
    write_atomically(server / ROOT_FILE, _pem(root))
    for name, kit in sites.items():
        key = _new_key()
        certificate = _certificate(name, key, issuer="simulated federation", issuer_key=root_key)
        write_atomically(kit / ROOT_FILE, _pem(root))
        write_atomically(kit / CERTIFICATE_FILE, _pem(certificate))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_atomically(kit / KEY_FILE, private)
    return [server, *sites.values()]


def _new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _certificate(name: str, key: rsa.RSAPrivateKey, *, issuer: str, issuer_key: rsa.RSAPrivateKey) -> x509.Certificate:
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)

"""A Postgres server that takes SCRAM over TLS alone, with certificates of an authority of its own."""

from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.postgres import PostgresServer, _unprivileged

if TYPE_CHECKING:
    from pathlib import Path

HOST = "localhost"
"""The name in the server's certificate; by its address the server is another host."""
BARRED = "barred"
"""A user whom the server lets in from nowhere."""

_HBA = f"""
host all {BARRED} all reject
hostssl all all all scram-sha-256
"""


class SecurePostgres(PostgresServer):
    """A Postgres server that takes SCRAM over TLS alone.

    Args:
        certificates: Folder for the certificates that clients use.
    """

    def __init__(self, certificates: Path) -> None:
        super().__init__()
        self.authority = certificates / "authority.pem"
        """Certificate of the authority that signed the server's."""
        self.other_authority = certificates / "other.pem"
        """Certificate of an authority that did not."""

    def _create(self, binaries: Path) -> None:
        super()._create(binaries)
        data = self._folder / "data"
        key, authority = _authority("authority of the tests")
        self.authority.write_bytes(_pem(authority))
        self.other_authority.write_bytes(_pem(_authority("another authority")[1]))
        server_key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(HOST, server_key, key, authority.subject)
        (data / "server.crt").write_bytes(_pem(certificate))
        (data / "server.key").write_bytes(
            server_key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        (data / "server.key").chmod(0o600)
        if user := _unprivileged():
            for name in ("server.crt", "server.key"):
                os.chown(data / name, user["user"], user["group"])
        (data / "pg_hba.conf").write_text(_HBA)
        with (data / "postgresql.conf").open("a") as settings:
            settings.write("\nssl = on\npassword_encryption = 'scram-sha-256'\n")


def _authority(name: str) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return key, _certificate(name, key, key, subject)


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, issuer: x509.Name
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=key is signer, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(signer, hashes.SHA256())
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)

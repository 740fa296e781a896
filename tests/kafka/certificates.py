"""A throw-away authority that signs certificates for brokers and clients of the tests."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """PEM files: a certificate, its key, and both in one as a broker wants them."""

    certificate: Path
    key: Path
    store: Path


class Authority:
    """Keeps its files in `folder`; `certificate` is what a client must trust."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder, self._name = folder, _named(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = folder / f"{name}.pem"
        basic = x509.BasicConstraints(ca=True, path_length=0)
        built = self._builder(self._name, self._key, 30).add_extension(basic, critical=True)
        self.certificate.write_bytes(_pem(built.sign(self._key, hashes.SHA256())))

    def issue(self, name: str, host: str = "127.0.0.1", days: int = 30, password: str | None = None) -> Pair:
        """Good for `days` from now; negative: expired. `password` locks the key."""
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            alternative = x509.DNSName(host)
        built = self._builder(_named(name), key, days)
        built = built.add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        certificate = _pem(built.sign(self._key, hashes.SHA256()))
        pair = Pair(*(self._folder / f"{name}{suffix}" for suffix in (".pem", ".key", ".store")))
        pair.certificate.write_bytes(certificate)
        pair.key.write_bytes(_key(key, password))
        pair.store.write_bytes(_key(key) + certificate)
        return pair

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 60 * _DAY)
            .not_valid_after(now + days * _DAY)
        )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key(key: ec.EllipticCurvePrivateKey, password: str | None = None) -> bytes:
    lock = (
        serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password.encode())
    )
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)

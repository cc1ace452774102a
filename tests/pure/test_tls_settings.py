"""TLS settings: what cannot work ends the process at its start, with a message without passwords."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from secured import Authority

from services.gateway.settings import GatewaySettings
from services.tools.local.settings import BrokerAddresses
from shared.runtime.settings import RedisSettings, ServiceSettings
from shared.runtime.settings_loading import problems_of
from shared.runtime.tls import bad_certificate

SECURE = {"amqp_url": "amqps://ann:hidden@rabbit:5671/", "redis_url": "rediss://:hidden@redis:6380/0"}


def problem(kind: type[Any], **fields: object) -> str:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(fields)
    text = "\n".join(problems_of(refused.value))
    assert "hidden" not in text
    return text


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_a_malformed_url_is_refused_without_its_password() -> None:
    assert "WISP_AMQP_URL must begin with amqp:// or amqps://" in problem(
        ServiceSettings, amqp_url="http://ann:hidden@rabbit/"
    )
    assert "WISP_REDIS_URL must begin with redis://" in problem(ServiceSettings, redis_url="ann:hidden@redis")
    assert "names no host" in problem(ServiceSettings, amqp_url="amqps://")
    assert "WISP_AMQP_URL: " in problem(ServiceSettings, amqp_url="amqp://ann:hidden@rabbit:port/")
    assert ServiceSettings(redis_url="unix:///run/redis.sock").redis_url == "unix:///run/redis.sock"
    assert "must begin with" in problem(BrokerAddresses, amqp_url="rabbit:5672")


@pytest.mark.parametrize(
    ("url", "instead"),
    [
        ("amqp://ann:hid#den@rabbit:5672/", "%23"),
        ("amqp://ann:1#hidden@rabbit/", "%23"),
        ("amqp://ann:hidden/1@rabbit/", "%2F"),
        ("amqp://ann:hidden?1@rabbit/", "%3F"),
    ],
)
def test_a_reserved_character_in_a_password_is_named(url: str, instead: str) -> None:
    said = problem(ServiceSettings, amqp_url=url)
    assert "WISP_AMQP_URL: the URL contains" in said
    assert f"write {instead} instead" in said


@pytest.mark.parametrize("url", ["amqp://rabbit:5672/at@host", "amqp://ann:hidden@[::1]:5672/", "amqp://a:%23@b/c@d"])
def test_other_places_of_reserved_characters_are_fine(url: str) -> None:
    assert ServiceSettings(amqp_url=url).amqp_url == url


@pytest.mark.parametrize("option", ["no_verify_ssl=1", "cafile=/x", "ssl_cert_reqs=none"])
def test_a_url_cannot_switch_certificate_checks_off(option: str) -> None:
    for name, url in SECURE.items():
        assert "use WISP_TLS_CA_FILE" in problem(ServiceSettings, **{name: f"{url}?{option}"})


def test_an_unusable_file_is_named(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("rabbit")
    _, other = authority.issue("other")
    rubbish = tmp_path / "rubbish"
    rubbish.write_text("rubbish")
    absent = tmp_path / "absent"
    assert f"tls_ca_file {absent}: No such file" in problem(ServiceSettings, **SECURE, tls_ca_file=absent)
    assert f"tls_ca_file {rubbish}: no PEM file" in problem(ServiceSettings, **SECURE, tls_ca_file=rubbish)
    assert "tls_key_file is set without its certificate" in problem(ServiceSettings, **SECURE, tls_key_file=key)
    wrong_pair = problem(ServiceSettings, **SECURE, tls_cert_file=cert, tls_key_file=other)
    assert "tls_cert_file and tls_key_file" in wrong_pair
    assert "certificate and key do not match" in wrong_pair
    assert str(absent) in problem(ServiceSettings, **SECURE, tls_cert_file=cert, tls_key_file=absent)
    assert str(absent) in problem(ServiceSettings, **SECURE, tls_cert_file=absent, tls_key_file=key)
    good = ServiceSettings(**SECURE, tls_ca_file=authority.file, tls_cert_file=cert, tls_key_file=key)  # type: ignore[arg-type]
    assert good.tls.redis_options(good.redis_url)["ssl_ca_certs"] == str(authority.file)
    assert good.tls.redis_options("redis://redis:6379") == {}


def test_certificates_without_a_tls_url_are_refused(authority: Authority) -> None:
    both = problem(ServiceSettings, tls_ca_file=authority.file)
    assert "nothing uses TLS: " in both
    assert "WISP_REDIS_URL begins with redis://" in both
    assert "WISP_AMQP_URL begins with amqp://" in both
    assert "amqp_url" not in problem(RedisSettings, tls_ca_file=authority.file)
    only_one = {"amqp_url": SECURE["amqp_url"], "tls_ca_file": authority.file}
    assert ServiceSettings.model_validate(only_one).tls.ca_file == authority.file


def test_the_gateways_certificate_is_loaded_at_the_start(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("gateway")
    assert "https_key_file is set, but not its certificate" in problem(GatewaySettings, https_key_file=key)
    assert f"{tmp_path / 'absent'}: No such file" in problem(GatewaySettings, https_cert_file=tmp_path / "absent")
    assert "https_cert_file and https_key_file" in problem(GatewaySettings, https_cert_file=cert)
    together = tmp_path / "both.pem"
    together.write_bytes(key.read_bytes() + cert.read_bytes())
    assert GatewaySettings.model_validate({"https_cert_file": together}).https_key_file is None


def test_a_key_with_a_passphrase_is_refused(authority: Authority, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    cert, key = authority.issue("gateway")
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    assert "the key has a passphrase" in problem(GatewaySettings, https_cert_file=cert, https_key_file=locked)


def test_the_causes_of_an_error_may_form_a_circle() -> None:
    """aio-pika's do, when a server hangs up: a search without end would stop the whole event loop."""
    first, second, third = ConnectionError("hung up"), ConnectionError("lost"), OSError("closed")
    first.__cause__, second.__cause__, third.__cause__ = second, third, second
    assert bad_certificate(first) is None
    third.__cause__ = None
    third.__context__ = refused = ssl.SSLCertVerificationError("x")
    refused.verify_message = "certificate has expired"
    assert bad_certificate(first) == "certificate has expired"

"""What is needed to log in is set, what is set has an effect, and no secret stands in a config."""

from __future__ import annotations

from typing import Any

import pytest

from streamcl.config import Config, ConfigError


def fault(kafka: dict[str, Any]) -> str:
    plain = {"name": "app", "events": {"url": "memory://site/e", "label": "y"}, "features": {"user": "categorical"}}
    with pytest.raises(ConfigError) as caught:
        Config.parse({**plain, "kafka": kafka})
    return str(caught.value)


@pytest.mark.parametrize(
    ("kafka", "text"),
    [
        ({"sasl_username": "us"}, "sasl_username has no effect with security_protocol PLAINTEXT; set SASL_SSL"),
        ({"sasl_mechanism": "PLAIN"}, "sasl_mechanism has no effect with security_protocol PLAINTEXT; set SASL_SSL"),
        ({"ssl_cafile": "ca.pem"}, "ssl_cafile has no effect with security_protocol PLAINTEXT; set SASL_SSL or SSL"),
        ({"ssl_check_hostname": False}, "ssl_check_hostname has no effect with security_protocol PLAINTEXT"),
        ({"security_protocol": "SSL", "ssl_certfile": "us.pem"}, "ssl_keyfile is needed by ssl_certfile"),
        ({"security_protocol": "SSL", "ssl_keyfile": "us.key"}, "ssl_certfile is needed by ssl_keyfile"),
        ({"security_protocol": "SSL", "ssl_key_password_env": "K"}, "ssl_key_password_env has no effect without ssl_k"),
        (
            {
                "security_protocol": "SSL",
                "ssl_certfile": "us.pem",
                "ssl_keyfile": "us.key",
                "ssl_key_password_env": "K",
                "ssl_key_password_file": "k",
            },
            "one of ssl_key_password_env and ssl_key_password_file is needed by ssl_keyfile",
        ),
        ({"security_protocol": "SASL_SSL"}, "sasl_mechanism is needed by security_protocol SASL_SSL"),
    ],
)
def test_a_security_setting_without_effect_or_half_given_is_named(kafka: Any, text: str) -> None:
    assert f"config: kafka: {text}" in fault(kafka)


@pytest.mark.parametrize(
    ("login", "text"),
    [
        ({"sasl_mechanism": "PLAIN"}, "sasl_username is needed by sasl_mechanism PLAIN"),
        (
            {"sasl_mechanism": "PLAIN", "sasl_username": "us"},
            "one of sasl_password_env and sasl_password_file is needed",
        ),
        (
            {"sasl_mechanism": "SCRAM-SHA-256", "sasl_token_file": "t"},
            "sasl_token_file has no effect with sasl_mechanism",
        ),
        ({"sasl_mechanism": "PLAIN", "sasl_scope": "s"}, "sasl_scope has no effect with sasl_mechanism PLAIN"),
        ({"sasl_username": "us"}, "sasl_username has no effect with sasl_mechanism OAUTHBEARER"),
        ({}, "sasl_mechanism OAUTHBEARER needs one of sasl_token_file and sasl_token_url"),
        ({"sasl_token_file": "t", "sasl_token_url": "https://h"}, "needs one of sasl_token_file and sasl_token_url"),
        ({"sasl_token_file": "t", "sasl_client_id": "us"}, "sasl_client_id has no effect with sasl_token_file"),
        ({"sasl_token_url": "http://h"}, "sasl_token_url must begin with https://"),
        ({"sasl_token_url": "https://us:hunter2@h"}, "sasl_token_url: no user or password in a URL"),
        ({"sasl_token_url": "https://h"}, "sasl_client_id is needed by sasl_token_url"),
        ({"sasl_token_url": "https://h", "sasl_client_id": "us"}, "one of sasl_client_secret_env and"),
    ],
)
def test_a_login_that_lacks_something_names_it(login: Any, text: str) -> None:
    found = fault({"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"} | login)
    assert text in found
    assert found.startswith("config: kafka: ")
    assert "hunter2" not in found

"""What tasks get to see of the program's environment."""

from __future__ import annotations

import pytest

from scaleout_mp.config import Surroundings
from scaleout_mp.errors import ConfigError
from scaleout_mp.sandbox.environment import scrub

KEPT = {
    "PATH": "/bin",
    "HOME": "/home/ada",
    "LANG": "sv_SE.UTF-8",
    "LC_TIME": "C",
    "TZ": "Europe/Stockholm",
    "VIRTUAL_ENV": "/venv",
    "LD_LIBRARY_PATH": "/opt/lib",
    "PYTHONHASHSEED": "0",
    "PYTHONWARNINGS": "error",
    "CUDA_VISIBLE_DEVICES": "1",
    "OMP_PROC_BIND": "true",
    "XDG_CACHE_HOME": "/cache",
    "SSL_CERT_FILE": "/etc/ca.pem",
    "REQUESTS_CA_BUNDLE": "/etc/ca.pem",
    "HF_HOME": "/models",
    "no_proxy": "localhost,.example.org",
}
DROPPED = {
    "SCALEOUT_TOKEN": "x",
    "SCALEOUT_CLIENT_TOKEN": "x",
    "SCALEOUT_AUTH_SCHEME": "Bearer",
    "FEDN_AUTH_TOKEN": "x",
    "AWS_SECRET_ACCESS_KEY": "x",
    "AWS_ACCESS_KEY_ID": "x",
    "GITHUB_TOKEN": "x",
    "HF_TOKEN": "x",
    "HF_HUB_API_KEY": "x",
    "PYTHON_GITLAB_PASSWORD": "x",
    "PYTHONSTARTUP": "/home/ada/.pythonrc",
    "PYTHONINSPECT": "1",
    "SSH_AUTH_SOCK": "/tmp/agent",
    "DBUS_SESSION_BUS_ADDRESS": "unix:path=/run/bus",
    "DATABASE_URL": "postgres://u:p@h/db",
    "ANYTHING": "x",
    "PWD": "/home/ada",
}


def test_an_allow_list_decides():
    assert scrub({**KEPT, **DROPPED}) == KEPT


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("http://proxy:3128", "http://proxy:3128"),
        ("http://ada:pw@proxy:3128/", "http://proxy:3128/"),
        ("ada:pw@proxy:3128", "proxy:3128"),
        ("http://ada:p@s/s@proxy", "http://proxy"),
        ("ada:x://y@proxy", "proxy"),
        ("socks5h://ada@[::1]:9", "socks5h://[::1]:9"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_loses_its_password(name, value, seen):
    assert scrub({name: value}) == {name: seen}


def test_what_the_user_names_goes_through_as_it_is():
    environ = {**DROPPED, "WANDB_API_KEY": "w", "WANDB_MODE": "off", "https_proxy": "http://u:p@h"}
    assert scrub(environ, ["AWS_SECRET_ACCESS_KEY", "WANDB_*", "https_proxy", "MISSING"]) == {
        "AWS_SECRET_ACCESS_KEY": "x",
        "WANDB_API_KEY": "w",
        "WANDB_MODE": "off",
        "https_proxy": "http://u:p@h",
    }


def test_a_pattern_never_takes_the_clients_own_token():
    assert scrub({**KEPT, **DROPPED}, ["*"]) == {
        name: value for name, value in {**KEPT, **DROPPED}.items() if not name.startswith(("SCALEOUT_", "FEDN_"))
    }
    assert scrub(DROPPED, ["*", "FEDN_AUTH_TOKEN"])["FEDN_AUTH_TOKEN"] == "x"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"environment": ["A"]}, "environment must be a dict, not list"),
        ({"environment": {"A=B": "c"}}, "environment: 'A=B' is no name of a variable"),
        ({"environment": {"": "c"}}, "environment: '' is no name of a variable"),
        ({"environment": {"SECRET": 5}}, "environment: the value of SECRET must be a string"),
        ({"environment": {"SECRET": "a\0b"}}, "environment: the value of SECRET must be a string"),
        ({"environment": {"TMPDIR": "/x"}}, r"environment: TMPDIR is set for each task; use scratch_folder="),
        ({"environment": {"OMP_NUM_THREADS": "3"}}, r"OMP_NUM_THREADS is set for each task; use Limits\(threads=\)"),
        ({"environment": {"PYTHONPATH": "/x"}}, r"environment: PYTHONPATH is set for each task; use sys.path"),
        ({"pass_environment": "HOME"}, "pass_environment must be a list of names, not 'HOME'"),
        ({"pass_environment": [5]}, r"pass_environment must be a list of names, not \[5\]"),
    ],
)
def test_wrong_values_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        Surroundings(**fields)

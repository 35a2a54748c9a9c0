"""Addresses of MLflow and of storages: what cannot serve is refused, what is secret is not shown."""

from __future__ import annotations

import pytest

from orchestration.common.redaction import redact
from orchestration.tracking.check import check_uri
from pruners.errors import InputError
from pruners.redaction import strip_credentials


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense", "ftp://host/x"])
def test_check__a_uri_that_cannot_serve_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match=r"tracking\.uri"):
        check_uri(uri)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:secret@host:5000", "http://host:5000"),
        ("https://user:p%40ss@host/path", "https://host/path"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:///runs/mlflow.db", "sqlite:///runs/mlflow.db"),
        ("http://user:se@secret@host:5000/x@y", "http://host:5000/x@y"),
    ],
)
def test_check__a_password_is_never_shown(uri: str, shown: str) -> None:
    assert strip_credentials(uri) == shown
    with pytest.raises(InputError) as refused:
        check_uri(uri.replace("http", "hxxp").replace("sqlite", "sqlyte"))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/imagenet@2024/train",
        "sqlite:////home/me@host/x.db",
        "file:///data/me@host/train",
        "http://host:5000/a@b",
        "http://[::1]:5000/a@b",
        "http://host/a?b=c@d#e@f",
        "s3://bucket/x?region=eu-west-1&endpoint_override=host:9000",
        "abfs://container@account.dfs.core.windows.net/train",  # a container is no user
        "gs://anonymous@bucket/train",
        "hdfs://me@host:8020/train",
        "/data/me@host/train",
    ],
)
def test_check__an_address_without_a_login_stays_the_same_place(uri: str) -> None:
    assert strip_credentials(uri) == uri


@pytest.mark.parametrize(
    ("uri", "kept"),
    [
        ("abfs://box:secret@account.dfs.core.windows.net/a@b", "abfs://box@account.dfs.core.windows.net/a@b"),
        ("abfs://box@acc/a?client_secret=s&tenant_id=1", "abfs://box@acc/a?tenant_id=1"),
        ("abfs://box@acc/a?client_secret=s", "abfs://box@acc/a"),
        ("postgresql://user:secret/1@host/db", "postgresql://host/db"),  # SQLAlchemy takes the slash
        ("mysql+pymysql://user:12/secret@host:3306/db", "mysql+pymysql://host:3306/db"),
        ("s3://key:sec/ret@bucket/a@b", "s3://bucket/a@b"),  # no URI, but shown where it is refused
    ],
)
def test_check__of_an_address_only_the_secret_goes(uri: str, kept: str) -> None:
    assert strip_credentials(uri) == kept


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/data/mine/train.parquet", "train.parquet"),
        ("~/mine/train", "train"),
        ("file:///data/mine/train", "train"),
        ("s3://bucket/mine/train", "s3://bucket/mine/train"),
        ("s3://key:secret@bucket/train", "s3://bucket/train"),
        ("models:/espalier-a@champion", "models:/espalier-a@champion"),
        (0.5, 0.5),
        ({"a": {"b": "/data/x"}}, {"a": {"b": "x"}}),
        (["/data/x", "s3://key:secret@bucket/y@z"], ["x", "s3://bucket/y@z"]),
    ],
)
def test_check__others_read_no_password_and_no_place_of_this_machine(value: object, shown: object) -> None:
    assert redact(value) == shown

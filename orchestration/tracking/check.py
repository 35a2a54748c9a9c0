"""Checks before anything is logged: an MLflow server answers, accepts our login and our names."""

from __future__ import annotations

import os
import re

from orchestration.common.redaction import strip_paths
from orchestration.tracking.server import answers, quiet_environment
from pruners.errors import InputError, first_line
from pruners.redaction import strip_credentials
from trainers.remote_calls import call_limited

_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,100}")  # names that any MLflow takes
_DATABASES = ("postgresql", "mysql", "mssql")  # databases with a server of their own


def check_uri(uri: str) -> None:
    """Check that MLflow answers at an address, and accepts our login.

    Raises:
        InputError: an HTTP server does not answer within seconds, or refuses the login; no URI of MLflow.
    """
    if uri.startswith(("http://", "https://")):
        if not answers(uri, timeout=5.0):
            raise InputError("tracking.uri", strip_credentials(uri), "no MLflow server answers there")
        _check_login(uri)
    elif uri.startswith(_DATABASES):
        _check_login(uri)
    elif "://" not in uri or not uri.startswith(("sqlite:", "file:", "databricks", "postgresql", "mysql")):
        raise InputError("tracking.uri", strip_credentials(uri), "must be an MLflow URI, as http://host:5000")


def _check_login(uri: str) -> None:
    """Send a request that a server answers to known users only."""
    import mlflow
    from mlflow.exceptions import MlflowException

    os.environ.update(quiet_environment())

    def ask() -> None:
        mlflow.MlflowClient(uri).search_experiments(max_results=1)

    try:
        call_limited(uri, ask)
    except TimeoutError as error:
        raise InputError("tracking.uri", strip_credentials(uri), f"does not answer ({error})") from None
    except ImportError as error:  # the database's driver is missing
        raise InputError("tracking.uri", strip_credentials(uri), f"is of no use ({error})") from None
    except MlflowException as error:
        known = "give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of who may use it"
        refused = error.get_http_status_code() in {401, 403}  # type: ignore[no-untyped-call]
        reason = strip_paths(first_line(error))[:200]
        raise InputError(
            "tracking.uri", strip_credentials(uri), known if refused else f"is of no use ({reason})"
        ) from None


# Names are checked by MLflow's own validators before a sweep begins, because the public API refuses a name
# only when a model is registered, hours later. The validators are private; checked with MLflow 3.17.2.


def check_name(name: str, key: str) -> None:
    """Check that MLflow accepts a name for a registered model.

    Raises:
        InputError: it does not, or the name cannot be written in ``models:/NAME@alias``.
    """
    if _PLAIN.fullmatch(name):
        return  # without MLflow, which takes seconds to import
    from mlflow.exceptions import MlflowException
    from mlflow.utils import validation

    try:
        validation._validate_model_name(name)
    except MlflowException as error:
        raise InputError(key, name, f"must be a name that MLflow takes ({first_line(error)})") from None
    if "@" in name or "'" in name:
        raise InputError(
            key, name, "must be a name without @ and quotes, so that models:/NAME@alias finds it"
        )


def check_alias(alias: str, key: str) -> None:
    """Check that MLflow accepts an alias.

    Raises:
        InputError: it does not.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils import validation

    try:
        validation._validate_model_alias_name(alias)  # type: ignore[no-untyped-call]
        validation._validate_model_alias_name_reserved(alias)  # type: ignore[no-untyped-call]
    except MlflowException as error:
        raise InputError(key, alias, f"must be an alias that MLflow takes ({first_line(error)})") from None

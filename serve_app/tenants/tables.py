"""The tables of tenants, API keys and the audit log. All instants are seconds since 1970."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, Double, ForeignKey, Identity, Integer, String, Table

from serve_app.database import metadata

_NAME = String(128)

# `limits` are those of `core.tenants.Limits` that are set.
tenants = Table(
    "tenants",
    metadata,
    Column("name", _NAME, primary_key=True),
    Column("weight", Double, nullable=False),
    Column("limits", JSON, nullable=False),
)

# `digest` is the SHA-256 of the secret in hexadecimal digits. `models` is null for all models.
keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("tenant", _NAME, ForeignKey("tenants.name"), nullable=False, index=True),
    Column("name", _NAME, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("models", JSON(none_as_null=True)),
    Column("limits", JSON, nullable=False),
    Column("created", Double, nullable=False),
    Column("expires", Double),
    Column("revoked", Double),
    Column("last_used", Double),
)

# The actions of administrators. `actor` is the public id of a key, or the user of a command line.
audit = Table(
    "audit_log",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), Identity(), primary_key=True),
    Column("at", Double, nullable=False),
    Column("actor", String(256), nullable=False),
    Column("action", String(64), nullable=False),
    Column("target", String(256), nullable=False),
    Column("details", JSON, nullable=False),
)

# One row with the number of changes of tenants and keys, so that a reader learns cheaply whether anything has changed.
revision = Table(
    "tenants_revision",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
)

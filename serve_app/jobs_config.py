"""The options of batch jobs and of idempotency keys."""

from __future__ import annotations

from pydantic import Field

from serve_app.section import Section


class BatchOptions(Section):
    """Files and batches of OpenAI's API, which are kept in the database.

    Each replica of the ingress runs up to `lines_in_flight` lines of a model at the same time, fewer while other
    requests wait. A file has at most `max_file_bytes`, a batch at most `max_lines` lines. A tenant has at most
    `max_open_batches` batches that have not ended, and files of `max_tenant_bytes` in total. Files and batches are
    deleted `retention_s` seconds after they were created, or after they ended.
    """

    lines_in_flight: int = Field(8, ge=1, le=1024)
    max_file_bytes: int = Field(104_857_600, ge=1024)
    max_lines: int = Field(100_000, ge=1)
    max_open_batches: int = Field(16, ge=1)
    max_tenant_bytes: int = Field(1_073_741_824, ge=1024)
    retention_s: float = Field(2_592_000, ge=3600)


class IdempotencyOptions(Section):
    """Answers that are kept for requests that are sent again with the same `Idempotency-Key`.

    Each ingress process keeps up to `max_kept` answers and `max_kept_bytes` in its memory; `max_kept: 0` ignores the
    header. With `shared` all ingresses keep them in the database, where each tenant has these limits. An answer
    expires `ttl_s` seconds after it was given.
    """

    max_kept: int = Field(1000, ge=0)
    max_kept_bytes: int = Field(67_108_864, ge=1024)
    ttl_s: float = Field(86_400, gt=0)
    shared: bool = False

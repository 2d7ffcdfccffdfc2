"""The tables of files, batches, their lines, and the answers to requests with an idempotency key."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Double, ForeignKey, Index, Integer, LargeBinary, String, Table, Text

from serve_app.database import metadata

# Instants are seconds since the epoch. A lease ends at `lease_until`; it is 0 without a holder.
_ID = String(64)
_NAME = String(256)

files = Table(
    "files",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("tenant", _NAME, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("filename", String(512), nullable=False),
    Column("size", BigInteger, nullable=False, default=0),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("complete", Boolean, nullable=False, default=False),  # a file whose upload has not ended is invisible
    Index("files_of_tenant", "tenant", "created_at", "id"),
)

# The content of a file: all parts but the last have PART_BYTES.
file_parts = Table(
    "file_parts",
    metadata,
    Column("file_id", _ID, ForeignKey("files.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("content", LargeBinary, nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("tenant", _NAME, nullable=False),
    Column("key", _NAME, nullable=False),
    Column("models", Text, nullable=False),  # those that the caller may use, as JSON; null is all
    Column("endpoint", String(64), nullable=False),
    Column("input_file", _ID, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("outcome", String(16), nullable=False, default=""),  # the status after finalizing
    Column("errors", Text, nullable=False, default="[]"),
    Column("total", Integer, nullable=False, default=0),
    Column("completed", Integer, nullable=False, default=0),  # of an ended batch
    Column("failed", Integer, nullable=False, default=0),
    Column("output_file", _ID),
    Column("error_file", _ID),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("in_progress_at", Double),
    Column("finalizing_at", Double),
    Column("cancelling_at", Double),
    Column("ended_at", Double),
    Column("progress_at", Double, nullable=False),  # the last change: of the status, or a result
    Column("claimed_at", Double, nullable=False, default=0.0),  # when a chunk was claimed last
    Column("owner", _NAME, nullable=False, default=""),
    Column("lease_until", Double, nullable=False, default=0.0),
    Index("batches_of_tenant", "tenant", "created_at", "id"),
    Index("batches_by_status", "status"),
)

# Consecutive lines of a batch's input, which one worker runs: `size` bytes from `offset`.
chunks = Table(
    "batch_chunks",
    metadata,
    Column("batch_id", _ID, ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("first_line", Integer, nullable=False),
    Column("lines", Integer, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("done", Boolean, nullable=False, default=False),
    Column("owner", _NAME, nullable=False, default=""),
    Column("lease_until", Double, nullable=False, default=0.0),
)

# The primary key is what makes a line be answered at most once.
results = Table(
    "batch_results",
    metadata,
    Column("batch_id", _ID, ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("failed", Boolean, nullable=False),
    Column("content", Text, nullable=False),  # the line of the output file
    Index("batch_results_by_outcome", "batch_id", "failed"),
)

# Requests with an idempotency key: those that run have no status.
kept_answers = Table(
    "idempotent_answers",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("key", _NAME, primary_key=True),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("owner", _NAME, nullable=False),
    Column("lease_until", Double, nullable=False),
    Column("status", Integer),
    Column("headers", Text, nullable=False, default="[]"),
    Column("body", LargeBinary, nullable=False, default=b""),
    Column("expires_at", Double, nullable=False),
)

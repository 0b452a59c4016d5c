"""The tables and the connection to the database: SQLite in one file by default, PostgreSQL or another by URL."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import Column
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.schema import CreateColumn

from swifti2v.errors import ConfigurationError, OutputError
from swifti2v.jobs.state import JobStage

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import URL, Connection, Engine

T = TypeVar("T")

BUSY_SECONDS = 30
"""How long a writer waits for another one on SQLite, which has one writer at a time."""

_RETRY_SECONDS = 0.2
# PostgreSQL's codes of a server that stops or starts, and of connections; some drivers raise them as other kinds.
_AWAY_CODES = re.compile(r"\b(57P0[1-3]|08[0-9A-Z]{3})\b")

METADATA = sa.MetaData()

JOBS = sa.Table(
    "jobs",
    METADATA,
    Column("id", sa.String(40), primary_key=True),
    Column("sequence", sa.Integer, nullable=False, unique=True),
    Column("owner", sa.String(100), nullable=False),
    Column("model", sa.String(400), nullable=False),
    Column("prompt", sa.Text, nullable=False),
    Column("options", sa.Text, nullable=False),
    Column("preview", sa.Boolean, nullable=False, server_default=sa.false()),
    Column("next_stage", sa.String(20), nullable=False, server_default=JobStage.ONE),
    Column("state", sa.String(20), nullable=False),
    Column("claims", sa.Integer, nullable=False, default=0),
    Column("releases", sa.Integer, nullable=False, default=0),
    Column("max_attempts", sa.Integer, nullable=False),
    Column("created_at", sa.Float(53), nullable=False),
    Column("available_at", sa.Float(53), nullable=False),
    Column("started_at", sa.Float(53)),
    Column("finished_at", sa.Float(53)),
    Column("worker", sa.String(200)),
    Column("lease_token", sa.String(40)),
    Column("lease_expires_at", sa.Float(53)),
    Column("progress", sa.Text, nullable=False),
    Column("result", sa.Text),
    Column("failure", sa.Text),
    Column("removed", sa.Boolean, nullable=False, default=False),
    sa.Index("jobs_claim", "state", "sequence"),
    sa.Index("jobs_owner", "owner", "sequence"),
)

SUBMISSIONS = sa.Table(
    # Its one row numbers the jobs. Whoever submits updates it first, so that submitters wait for each other on every
    # kind of database, and the bound of the queue is exact.
    "submissions",
    METADATA,
    Column("id", sa.Integer, primary_key=True),
    Column("last_sequence", sa.Integer, nullable=False),
)


class Database:
    """Connections to one database, whose tables are made if they are missing, and brought up to date if they are old.

    Args:
        url: as SQLAlchemy writes it, ``sqlite:///queue.db`` or ``postgresql+pg8000://user@host/name``.
        patience_seconds: how long an operation is tried again while the database cannot be reached.

    Raises:
        ConfigurationError: the URL cannot be read, or its driver is not installed.
        OutputError: the database cannot be opened.
    """

    def __init__(self, url: str, *, patience_seconds: float = 15.0) -> None:
        self._patience_seconds = patience_seconds
        self._url = _read_url(url)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        self.engine = _open(self._url, is_sqlite=self.is_sqlite)
        self.run(self._create_tables)

    def run(self, operation: Callable[[Connection], T]) -> T:
        """Return what `operation` makes of a connection, in one transaction.

        It is run again while the database is away (a restart, a lost connection), so it must give the same effect when
        it is repeated after a commit whose answer was lost.

        Raises:
            OutputError: the database stayed away, or refuses.
        """
        deadline = time.monotonic() + self._patience_seconds
        while True:
            try:
                with self.engine.begin() as connection:
                    return operation(connection)
            except (DBAPIError, ConnectionError) as error:  # a driver may let errors of its socket through
                if not self._is_away(error) or time.monotonic() > deadline:
                    msg = f"the job database fails ({_first_line(error)}); check that it runs and can be written"
                    raise OutputError(msg) from error
                time.sleep(_RETRY_SECONDS)

    def close(self) -> None:
        """Close the connections; later operations open new ones."""
        self.engine.dispose()

    def _is_away(self, error: DBAPIError | ConnectionError) -> bool:
        """Whether trying again may help: the server or the connection is gone, or SQLite is held by another writer."""
        if isinstance(error, ConnectionError):
            return True
        if self.is_sqlite:
            return "locked" in str(error.orig) or "busy" in str(error.orig)
        code = f"{getattr(error.orig, 'sqlstate', '')} {error.orig}"
        away = error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
        return away or _AWAY_CODES.search(code) is not None

    def _create_tables(self, connection: Connection) -> None:
        try:
            METADATA.create_all(connection)
        except DBAPIError as error:
            if "exist" not in str(error.orig).lower():  # another process has made them in the same moment
                raise
        _upgrade(connection)
        if connection.execute(sa.select(SUBMISSIONS.c.id)).first() is None:
            try:
                with connection.begin_nested():
                    connection.execute(sa.insert(SUBMISSIONS).values(id=1, last_sequence=0))
            except IntegrityError:
                pass  # the same


def _upgrade(connection: Connection) -> None:
    """Add the columns that tables of an earlier version lack.

    Those of 0.1.0 know no previews, which were then jobs for a model named ``preview:NAME``. A job that is half made
    in tables without `next_stage` begins with Stage I, which finds its own work done.
    """
    if _adds(connection, JOBS.c.preview):
        prefix = "preview:"
        name = sa.func.substr(JOBS.c.model, len(prefix) + 1)
        connection.execute(sa.update(JOBS).where(JOBS.c.model.startswith(prefix)).values(model=name, preview=True))
    _adds(connection, JOBS.c.next_stage)


def _adds(connection: Connection, column: Column[Any]) -> bool:
    """Add a column unless it is there; tell whether it was missing."""
    if _has(connection, column):
        return False
    described = CreateColumn(column).compile(connection)
    try:
        with connection.begin_nested():
            connection.exec_driver_sql(f"ALTER TABLE {JOBS.name} ADD COLUMN {described}")
    except DBAPIError:
        if not _has(connection, column):  # else another process has added it in the same moment
            raise
    return True


def _has(connection: Connection, column: Column[Any]) -> bool:
    return column.name in {found["name"] for found in sa.inspect(connection).get_columns(JOBS.name)}


def sqlite_url(path: Path) -> str:
    """Return the URL of the SQLite database in `path`."""
    return f"sqlite:///{path}"


def _read_url(url: str) -> URL:
    try:
        return sa.make_url(url)
    except ArgumentError as error:
        msg = "the URL of the job database cannot be read; write for instance sqlite:///queue.db"
        raise ConfigurationError(msg) from error


def _open(url: URL, *, is_sqlite: bool) -> Engine:
    try:
        if is_sqlite:
            engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS})
            sa.event.listen(engine, "connect", _prepare_sqlite)
            return engine
        return sa.create_engine(url, pool_pre_ping=True)
    except (NoSuchModuleError, ImportError) as error:
        name = url.drivername
        msg = f"there is no driver for {name!r}; install it, or use sqlite:///queue.db or postgresql+pg8000://..."
        raise ConfigurationError(msg) from error


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for name, value in (("journal_mode", "WAL"), ("synchronous", "NORMAL")):
        cursor.execute(f"PRAGMA {name}={value}")
    cursor.close()


def _first_line(error: DBAPIError | ConnectionError) -> str:
    cause = error.orig if isinstance(error, DBAPIError) else error
    return (str(cause) or type(error).__name__).splitlines()[0]
